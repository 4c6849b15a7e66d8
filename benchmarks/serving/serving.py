"""Five branches behind our server against a plain endpoint, SmolLM2-135M in bfloat16, one thread.

64 concurrent clients with one sample each, groups of 16 sharing a prompt of about 200 tokens. Peers
score each request by itself, after OpenRLHF's `serve_rm`: `one` Hugging Face model, and the `loop`
over five. All servers stay loaded and idle but for the one that is measured; rounds alternate.

`throughput_vs_one`, `throughput_vs_loop`: ours/theirs, requests a second in a closed loop.
`p99_vs_one`: theirs/ours, latency in that loop. `overhead_share`: of the wall time at full load,
what is not spent in `ensemble.score`; `throughput_vs_direct`: requests a second over samples a
second of `ensemble.score` alone on the same samples, 64 at a time, with nothing served. An open
loop gives the percentiles against the offered load.

`--soak SECONDS`: the server under 70 % of its load, with clients that leave, clients that send half
a request, and in the first half three kills; every request is repeated until it is answered, and a
member that marks completions tells whether an answer is another's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.serving.serving_load import Answer, Work, closed_loop, open_loop
from benchmarks.serving.serving_sides import body, make_ensemble, tag
from benchmarks.serving.serving_soak import soak
from benchmarks.shared.common import SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import HuggingFace, groups, make_classifier
from ensemble_rm import Sample, TrunkOptions
from ensemble_rm.members.backbone.checkpoint import load_tokenizer, locate

HERE = Path(__file__).resolve().parent
DATA = SHARED_DATA / "hh_rlhf.jsonl"
SIDES = ("ours", "one", "loop")
GROUP = 16
LOADS = (0.3, 0.5, 0.7, 0.85, 1.0)  # of a side's throughput in the closed loop


class Server:
    """One side, in a process of its own."""

    def __init__(self, side: str, args: argparse.Namespace, folder: Path) -> None:
        self.side, self.args, self.folder = side, args, folder
        self.file = folder.parent / f"port-{side}"
        self.log = folder.parent / f"log-{side}"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.launch()
        self.wait()

    def launch(self) -> None:
        self.file.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "serving_sides.py"), "--side", self.side]
        command += ["--folder", str(self.folder), "--cache-dir", str(self.args.cache_dir)]
        command += ["--port-file", str(self.file), "--threads", str(self.args.threads)]
        threads = str(self.args.threads)
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stderr=self.log.open("ab"),
        )

    def wait(self) -> None:
        assert self.process is not None
        while not self.file.exists() or self.status("/ready") != 200:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
            if self.file.exists():
                self.port = int(self.file.read_text())

    def get(self, path: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def status(self, path: str) -> int:
        try:
            return self.get(path)[0]
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        rows = [r.split() for r in self.get("/metrics")[1].splitlines() if not r.startswith("#")]
        return sum(float(v) for key, v in rows if key.split("{")[0] == f"ensemble_rm_{name}")

    def resident(self) -> float:
        """MiB that it holds."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(r.split()[1]) for r in lines if r.startswith("VmRSS:")) / 1024

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def works_of(side: str, samples: list[Sample], texts: list[str]) -> list[Work]:
    return [body(side, sample, text) for sample, text in zip(samples, texts, strict=True)]


def percentiles(answers: list[Answer]) -> dict[str, float]:
    took = [a.took for a in answers]
    return {f"p{q}": float(np.percentile(took, q)) for q in (50, 95, 99)}


def direct_rate(args: argparse.Namespace, samples: list[Sample]) -> float:
    """Return the samples a second of `ensemble.score` alone."""
    args.side = "ours"
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    ensemble = make_ensemble(args, options)
    ensemble.score(samples[:GROUP])
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < args.seconds / 2:
        at = done % len(samples)
        chunk = samples[at : at + args.clients]
        ensemble.score(chunk)
        done += len(chunk)
    return done / (time.perf_counter() - began)


def measure_closed(
    args: argparse.Namespace, servers: dict[str, Server], works: dict[str, list[Work]]
) -> dict[str, dict[str, list[float]]]:
    """Each side's rates, percentiles and overhead, a round each."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    for i in range(args.rounds):
        for side in SIDES if i % 2 else SIDES[::-1]:
            server = servers[side]
            seconds = args.seconds * (1.5 if side == "loop" else 1)
            probe = partial(server.metric, "scoring_seconds_total") if side == "ours" else float
            answers, window, busy = asyncio.run(
                closed_loop(
                    server.port,
                    works[side],
                    clients=args.clients,
                    seconds=seconds,
                    warm=args.warm,
                    probe=probe,
                )
            )
            said = {"rate": len(answers) / window} | percentiles(answers)
            if side == "ours":
                said["overhead"] = 1 - busy
            for name, value in said.items():
                found[side].setdefault(name, []).append(value)
            print(side, {name: round(value, 4) for name, value in said.items()}, flush=True)
            settle(server, again=side == "one" or i + 1 < args.rounds)
    return found


def settle(server: Server, *, again: bool) -> None:
    """Clear the work of requests that clients abandoned.

    Ours drops it, but for the batch that it scores. A plain endpoint scores it all the same, for
    minutes, and is restarted if it is measured again.
    """
    if server.side == "ours":
        spent = -1.0
        while server.metric("queue_samples") > 0 or spent != server.metric("scoring_seconds_total"):
            spent = server.metric("scoring_seconds_total")
            time.sleep(0.5)
    else:
        server.kill()
        if again:
            server.start()


def sweep(
    args: argparse.Namespace,
    server: Server,
    works: list[Work],
    rate: float,
    figures: Figures,
) -> list[tuple[float, dict[str, float]]]:
    """Percentiles of one side against the offered load."""
    found = []
    for load in LOADS if not args.quick else LOADS[-1:]:
        answers = asyncio.run(
            open_loop(
                server.port,
                works,
                rate=load * rate,
                groups=args.groups,
                group=GROUP,
                seed=0,
            )
        )
        said = percentiles(answers)
        found.append((load * rate, said))
        for name, value in said.items():
            figure = f"{server.side}_{name}_at_{load:g}"
            figures.add_value(figure, value, len(answers))
    return found


def draw(found: dict[str, list[tuple[float, dict[str, float]]]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (side, rows), colour in zip(found.items(), ("tab:blue", "tab:red"), strict=True):
        for name, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
            xs, ys = [rate for rate, _ in rows], [said[name] for _, said in rows]
            axes.plot(xs, ys, style, color=colour, marker="o", ms=3, label=f"{side}, {name}")
    axes.set(xlabel="offered load, requests/s", ylabel="latency, s", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=130)


def run(args: argparse.Namespace, figures: Figures, place: Path) -> None:
    backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
    folder = make_classifier(backbone, place / "model")
    samples = groups(args, load_tokenizer(backbone.folder))
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    texts = HuggingFace(folder, options, 0).texts(samples)
    works = {side: works_of(side, samples, texts) for side in SIDES}
    servers = {side: Server(side, args, folder) for side in SIDES}
    try:
        for server in servers.values():
            server.launch()
        for server in servers.values():
            server.wait()
        found = measure_closed(args, servers, works)
        add_closed(figures, found, direct_rate(args, samples))
        figures.write()
        swept: dict[str, Any] = {}
        for side in ("ours", "one"):
            rate = float(np.median(found[side]["rate"]))
            swept[side] = sweep(args, servers[side], works[side], rate, figures)
        if args.json is not None:
            draw(swept, args.json.with_suffix(".png"))
        figures.write()
    finally:
        for server in servers.values():
            if server.process is not None:
                server.kill()
    if args.soak > 0:
        rate = 0.7 * float(np.median(found["ours"]["rate"]))
        tagged = Server("tagged", args, folder)
        picture = None if args.json is None else args.json.with_name("serving_soak.png")
        marks = [tag(sample.completion) for sample in samples]
        soak(tagged, works_of("tagged", samples, texts), marks, rate, args.soak, figures, picture)


def add_closed(figures: Figures, found: dict[str, dict[str, list[float]]], direct: float) -> None:
    ours = {name: np.array(values) for name, values in found["ours"].items()}
    figures.add_repeats("requests_per_second", found["ours"]["rate"])
    for side in ("one", "loop"):
        figures.add_repeats(f"{side}_requests_per_second", found[side]["rate"])
        ratio = ours["rate"] / np.array(found[side]["rate"])
        figures.add_repeats(f"throughput_vs_{side}", list(ratio))
    figures.add_repeats("p99_vs_one", list(np.array(found["one"]["p99"]) / ours["p99"]))
    figures.add_repeats("overhead_share", found["ours"]["overhead"])
    figures.add_repeats("throughput_vs_direct", list(ours["rate"] / direct))
    for name in ("p50", "p95", "p99"):
        figures.add_repeats(f"closed_ours_{name}", found["ours"][name])
        figures.add_repeats(f"closed_one_{name}", found["one"][name])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--prompts", type=int, default=48, help="that the groups share")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--groups", type=int, default=8, help="that come at each offered load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a measurement")
    parser.add_argument("--warm", type=float, default=5.0, help="seconds before it")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="0: none")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.clients, args.rounds, args.seconds, args.warm = 2, 16, 1, 2.0, 0.5
        args.groups = 1
    torch.set_num_threads(args.threads)
    figures = Figures(args)
    with tempfile.TemporaryDirectory() as name:
        run(args, figures, Path(name))
    figures.write()


if __name__ == "__main__":
    main()
