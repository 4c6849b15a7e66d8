"""Members on other servers: concurrent requests against one member after the other.

Five servers, each a process of its own, speak OpenRLHF's wire format over HTTP and answer a request
after a fixed time, which simulates a large model's pass: what is measured is how an ensemble waits,
not how fast anything scores. The local member multiplies matrices for as long as a server takes;
like a model's pass, that leaves the interpreter free. Both sides score the same samples with the
same members, in turn: `RewardEnsemble.score`, and a loop over each member's `score`.

Figures: `remote5_vs_turns`, the loop's time over the ensemble's, five remote members;
`remote5_vs_one`, the ensemble's time over that of one of its members alone, at best 1;
`mixed_vs_turns`, the loop's time over the ensemble's, with the local member added.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, seconds
from ensemble_rm import RewardEnsemble, Sample, Scorer
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members import ClientOptions, RemoteScorer

MEMBERS = 5
BATCH = 64
CONCURRENCY = 4


def serve(bound: socket.socket, latency: float) -> None:
    """Answer each request with its texts' lengths after `latency` seconds."""

    async def get_reward(request: Request) -> JSONResponse:
        texts = (await request.json())["query"]
        await asyncio.sleep(latency)
        return JSONResponse({"rewards": [float(len(text)) for text in texts]})

    app = Starlette(routes=[Route("/get_reward", get_reward, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[bound])


def start(stack: ExitStack, latency: float) -> int:
    """Start a server; return its port."""
    bound = stack.enter_context(closing(socket.socket()))
    bound.bind(("127.0.0.1", 0))
    bound.listen(128)
    process = multiprocessing.get_context("fork").Process(
        target=serve, args=(bound, latency), daemon=True
    )
    process.start()
    stack.callback(process.join)
    stack.callback(process.terminate)
    return int(bound.getsockname()[1])


class Local:
    """A member that computes for so many seconds, and no longer however busy the machine is."""

    names = ("local",)

    def __init__(self, latency: float) -> None:
        self.matrix = np.random.default_rng(0).normal(size=(400, 400))
        began, n = perf_counter(), 0
        while perf_counter() - began < 1.0:
            self.matrix @ self.matrix
            n += 1
        self.products = max(round(n * latency), 1)

    def score(self, samples: Sequence[Sample]) -> np.ndarray:
        for _ in range(self.products):
            self.matrix @ self.matrix
        return np.array([[float(len(sample.completion))] for sample in samples])


def in_turn(members: Sequence[Scorer], samples: Sequence[Sample]) -> np.ndarray:
    """Score with each member once the one before it is done."""
    return np.concatenate([member.score(samples) for member in members], axis=1)


def compare(
    members: Sequence[Scorer], samples: Sequence[Sample], repeats: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the seconds of the loop, of the ensemble, and of one member, by turns."""
    k = len(members)
    ensemble = RewardEnsemble(tuple(members), Normaliser.identity(k), mean())
    assert np.array_equal(ensemble.score(samples).raw, in_turn(members, samples))
    sides: list[Callable[[], Any]] = [
        lambda: in_turn(members, samples),
        lambda: ensemble.score(samples),
        lambda: members[0].score(samples),
    ]
    found: list[list[float]] = [[], [], []]
    for _ in range(repeats):
        for times, side in zip(found, sides, strict=True):
            times.append(seconds(side))
    return found[0], found[1], found[2]


def run(args: argparse.Namespace) -> None:
    figures = Figures(args)
    repeats, latency = (3, 0.2) if args.quick else (15, 0.5)
    samples = [Sample("", "x" * i) for i in range(BATCH * CONCURRENCY)]
    with ExitStack() as stack:
        ports = [start(stack, latency) for _ in range(MEMBERS)]
        sleep(1.0)
        members: list[Scorer] = [
            RemoteScorer(
                f"http://127.0.0.1:{port}",
                protocol="openrlhf",
                name=f"server {i}",
                template="plain",
                raw_logit_check="off",
                batch_size=BATCH,
                client=ClientOptions(concurrency=CONCURRENCY),
            )
            for i, port in enumerate(ports)
        ]
        turns, ours, one = compare(members, samples, repeats)
        figures.add_repeats("remote5_vs_turns", ratios(turns, ours))
        figures.add_repeats("remote5_vs_one", ratios(ours, one))
        turns, ours, _ = compare([*members, Local(latency)], samples, repeats)
        figures.add_repeats("mixed_vs_turns", ratios(turns, ours))
    figures.write()


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


if __name__ == "__main__":
    run(make_parser(__doc__).parse_args())
