"""Minutes of load on one server, with kills, slow clients and clients that leave."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from benchmarks.serving.serving_load import Answer, Nuisance, Work, ask_until_answered

if TYPE_CHECKING:
    from benchmarks.shared.common import Figures

KILLS = (1 / 8, 2 / 8, 3 / 8)  # of the time; after the last, memory is watched
GROUP = 16
GRACE = 120.0  # seconds for the last requests
Readings = list[tuple[float, float]]


class Server(Protocol):
    """What is under load."""

    port: int
    process: subprocess.Popen[bytes] | None

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def resident(self) -> float: ...
    def metric(self, name: str) -> float: ...


class Soak:
    """One run, and what it saw."""

    def __init__(
        self, server: Server, works: list[Work], marks: list[float], rate: float, seconds: float
    ) -> None:
        self.server, self.works, self.marks = server, works, marks
        self.rate, self.seconds = rate, seconds
        self.began = perf_counter()
        self.answers: list[Answer | None] = []
        self.memory: Readings = []
        self.kills: list[float] = []
        self.sent = 0
        self.killed = False
        self.restarted = 0.0  # for the last time
        self.quiet_from = 0.0  # neither new requests nor kills

    @property
    def now(self) -> float:
        return perf_counter() - self.began

    async def run(self) -> None:
        nuisance = Nuisance(self.server.port, self.works, every=1.0)
        over = asyncio.ensure_future(self._load())
        await asyncio.gather(
            over, self._kill(), self._watch(over), nuisance.run(lambda: self.now > self.seconds)
        )

    async def _load(self) -> None:
        rng = np.random.default_rng(0)
        tasks = []
        while self.now < self.seconds:
            for _ in range(GROUP):
                work = self.works[self.sent % len(self.works)]
                task = ask_until_answered(self.server.port, self.sent, work, self._given_up)
                tasks.append(asyncio.ensure_future(task))
                self.sent += 1
            await asyncio.sleep(float(rng.exponential(GROUP / self.rate)))
        self.quiet_from = max(self.quiet_from, self.now)
        self.answers = await asyncio.gather(*tasks)

    def _given_up(self) -> bool:
        """Whether the last requests have had their time, since load and kills are over."""
        return self.killed and self.now > max(self.quiet_from, self.seconds) + GRACE

    async def _kill(self) -> None:
        for share in KILLS:
            await asyncio.sleep(max(share * self.seconds - self.now, 0))
            self.kills.append(self.now)
            self.server.kill()
            await asyncio.to_thread(self.server.start)
        self.killed, self.restarted = True, self.now
        self.quiet_from = max(self.quiet_from, self.now)

    async def _watch(self, over: asyncio.Future[None]) -> None:
        while not over.done():
            process = self.server.process
            if process is not None and process.poll() is None:
                with suppress(OSError, StopIteration):  # it may be killed meanwhile
                    self.memory.append((self.now, self.server.resident()))
            await asyncio.sleep(1)

    # What it saw -----------------------------------------------------------------------------

    def lost(self) -> int:
        return sum(answer is None for answer in self.answers)

    def mixed_up(self) -> int:
        """Count answers whose last member's score is not the mark of what was sent."""
        wrong = 0
        for answer in self.answers:
            if answer is not None:
                marks = [row[-1] for row in answer.said["members"]]
                wrong += marks != [self.marks[answer.index % len(self.marks)]]
        return wrong

    def growth(self) -> float:
        """Memory of the last quarter over that of the one before it."""
        start = max(self.seconds / 2, self.restarted)
        quiet = [(t, m) for t, m in self.memory if start < t <= self.seconds]
        half = len(quiet) // 2
        if half == 0:
            return float("nan")
        return float(
            np.median([m for _, m in quiet[half:]]) / np.median([m for _, m in quiet[:half]])
        )


def soak(
    server: Server,
    works: list[Work],
    marks: list[float],
    rate: float,
    seconds: float,
    figures: Figures,
    picture: Path | None,
) -> None:
    server.start()
    try:
        run = Soak(server, works, marks, rate, seconds)
        asyncio.run(run.run())
        dropped = server.metric("dropped_requests_total")
    finally:
        server.kill()
    there = [a for a in run.answers if a is not None]
    n = run.sent
    for name, value in (
        ("soak_seconds", seconds),
        ("soak_requests", n),
        ("soak_kills", len(run.kills)),
        ("soak_lost", run.lost()),
        ("soak_doubled_or_mixed_up", run.mixed_up() + len(there) - len({a.index for a in there})),
        ("soak_dropped_since_last_kill", dropped),
        ("soak_memory_growth", run.growth()),
        *((f"soak_p{q}", float(np.percentile([a.took for a in there], q))) for q in (50, 99)),
    ):
        figures.add_value(name, value, n)
    if picture is not None:
        draw(run, there, picture)


def draw(run: Soak, answers: list[Answer], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, low) = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    xs = [a.asked - run.began for a in answers]
    top.plot(
        xs, [a.took for a in answers], ".", ms=2, alpha=0.5, label="a request, with its retries"
    )
    for i, at in enumerate(run.kills):
        label = "kill" if i == 0 else None
        for axes in (top, low):
            axes.axvline(at, color="tab:red", lw=1, label=label if axes is top else None)
    top.set(ylabel="latency, s", yscale="log")
    top.legend(fontsize=8, loc="upper right")
    low.plot([t for t, _ in run.memory], [m for _, m in run.memory], color="tab:green")
    low.set(xlabel="seconds", ylabel="resident, MiB", ylim=(0, None))
    figure.savefig(file, dpi=130)
