"""How much of the package runs on the five ways: own files and functions, counted by a profiler.

- `score`: the first `RewardEnsemble.score` of a loaded ensemble: five solved heads on MiniLM-L6,
  each with its own view, no cache.
- `score_again`: the second call on the same samples.
- `recalibrate`: a month of new judgments whose pairs are in the score table, so that no model runs.
- `http`: one POST to /v1/score, from the accepted connection to the answer, after one request to
  warm up; two FunctionScorers.
- `train`: five heads with a view each on MiniLM-L6, no cache.

A file counts if one of its functions runs; comprehensions, lambdas and generators count to their
file. What runs while a module is imported does not count. `score` and `score_again` leave out
`members/forward/cpu/`, which is absent on other devices. `score_frames` is the number of own frames
on the stack when transformers' model is called, from `RewardEnsemble.score` to the caller of the
model's forward, both included; frames of comprehensions do not count.

Each way runs in its own process. `--list` prints the files of each way, with their functions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from time import sleep
from types import CodeType, FrameType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import ROOT, Figures, make_parser
from benchmarks.shared.preference_runs import package_folder

PACKAGE = str(ROOT / "ensemble_rm") + "/"
CPU_ONLY = "members/forward/cpu/"
GOALS = {
    "score_files": 14,
    "score_again_files": 12,
    "score_frames": 6,
    "http_files": 14,
    "recalibrate_files": 35,
    "train_files": 25,
}
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


class Recorder:
    """Records the package's functions that run inside `record`, in every thread.

    Threads that started before this object was made are not seen.
    """

    def __init__(self) -> None:
        self.recording = False
        self.codes: set[CodeType] = set()
        self.frames: list[list[str]] = []
        self._importing = threading.local()
        threading.setprofile(self._on_event)  # a server's threads start before its request

    @contextmanager
    def record(self) -> Iterator[None]:
        self.recording = True
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.recording = False

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            depth = getattr(self._importing, "depth", 0)
            self._importing.depth = max(depth + (1 if event == "call" else -1), 0)
        elif event == "call" and self.recording and not getattr(self._importing, "depth", 0):
            if code.co_filename.startswith(PACKAGE):
                self.codes.add(code)
            elif code.co_name == "forward" and "/transformers/models/" in code.co_filename:
                self._add_stack(frame.f_back)

    def _add_stack(self, frame: FrameType | None) -> None:
        """Record the own frames between `RewardEnsemble.score` and a model's outermost forward."""
        own = []
        while frame is not None:
            code = frame.f_code
            if "/transformers/models/" in code.co_filename:
                return  # a layer of a model whose forward was recorded before
            if code.co_filename.startswith(PACKAGE) and code.co_name not in COMPREHENSIONS:
                own.append(f"{code.co_filename.removeprefix(PACKAGE)}: {code.co_qualname}")
                if code.co_qualname == "RewardEnsemble.score":
                    self.frames.append(own[::-1])
                    return
            frame = frame.f_back

    def result(self) -> dict[str, Any]:
        """Return the functions of each file, and the longest recorded stack."""
        files: dict[str, set[str]] = {}
        for code in self.codes:
            # A comprehension or a lambda is a part of the function around it.
            name = code.co_qualname.split(".<locals>")[0].split(".<lambda>")[0]
            files.setdefault(code.co_filename.removeprefix(PACKAGE), set()).add(name)
        return {
            "files": {name: sorted(functions) for name, functions in sorted(files.items())},
            "frames": max(self.frames, key=len, default=[]),
        }


# The ways: each prepares without being recorded and returns what is recorded. -------------------


def make_pairs(count: int, *, seed: int) -> Any:
    """Return pairs in which the longer completion wins three times out of four."""
    from ensemble_rm import Preference, Preferences

    rng = np.random.default_rng(seed)
    words = ["tea", "rain", "sea", "dog", "cat", "bread", "wine", "house", "warm", "cold", "old"]
    pairs = []
    for i in range(count):
        question = f"question {seed}.{i}: {' '.join(rng.choice(words, 4))}?"
        sides = [" ".join(rng.choice(words, n)) for n in (12, 6)]
        pairs.append(Preference(question, *(sides if rng.random() < 0.75 else sides[::-1])))
    return Preferences(tuple(pairs))


def train_heads(size: int, backbone: Path) -> Any:
    from ensemble_rm import TrunkOptions, train

    return train(
        make_pairs(size, seed=0),
        make_pairs(size // 2, seed=1),
        backbone=backbone,
        members=5,
        options=TrunkOptions(device="cpu"),
        cache_dir=None,
    )


def saved_heads(folder: Path, size: int) -> Path:
    ensemble = train_heads(size, package_folder("minilm"))
    ensemble = ensemble.calibrate(make_pairs(2 * size, seed=2).shuffled_sides(seed=0))
    return Path(ensemble.save_pretrained(folder / "ensemble"))


def prepare_score(folder: Path, size: int) -> Callable[[], Any]:
    from ensemble_rm import RewardEnsemble

    ensemble = RewardEnsemble.from_pretrained(saved_heads(folder, size), cache_dir=None)
    samples = make_pairs(size, seed=3).samples()
    return lambda: ensemble.score(samples)


def prepare_score_again(folder: Path, size: int) -> Callable[[], Any]:
    score = prepare_score(folder, size)
    score()
    return score


def prepare_train(folder: Path, size: int) -> Callable[[], Any]:  # noqa: ARG001
    backbone = package_folder("minilm")
    return lambda: train_heads(size, backbone)


def prepare_recalibrate(folder: Path, size: int) -> Callable[[], Any]:
    """Run the job once on a month of judgments, then add a second month on the same pairs.

    The judgments follow the ensemble's margins at another temperature than its own, so that the
    counted job goes the whole way: it fits, passes the gate and publishes.
    """
    from ensemble_rm import Judgment, JudgmentStore, RewardEnsemble, recalibrate

    run = saved_heads(folder, size)
    pairs = make_pairs(600, seed=4)
    prompts, first, second = zip(*((p.prompt, p.chosen, p.rejected) for p in pairs), strict=True)
    ensemble = RewardEnsemble.from_pretrained(run, cache_dir=None)
    p = ensemble.compare(prompts, first, second).probability
    share = 1 / (1 + ((1 - p) / p) ** 3)  # a third of its temperature
    store = JudgmentStore.create(folder / "judgments.db")
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def judge(month: int) -> None:
        wins = np.random.default_rng(month).random(len(pairs)) < share
        store.add(
            [
                Judgment(
                    *(prompts[i], first[i], second[i], "first" if won else "second"),
                    f"annotator {i % 5}",
                    start + timedelta(days=30 * month, minutes=i),
                    "paths",
                )
                for i, won in enumerate(wins)
            ]
        )

    def job(month: int, **options: Any) -> Any:
        end = start + timedelta(days=30 * month)
        return recalibrate(run, store, clock=lambda: end, **options)

    def no_model(*_: object, **__: object) -> RewardEnsemble:
        raise AssertionError("a model was loaded: the scores are not in the table")

    judge(0)
    job(1)
    judge(1)

    def recalibrate_again() -> None:
        outcome = job(2, load=no_model)
        assert outcome.verdict == "published", outcome.reason  # the whole way was gone

    return recalibrate_again


def prepare_http(folder: Path, size: int) -> Callable[[], Any]:  # noqa: ARG001
    """Start the server in a thread; a first request warms it up."""
    import uvicorn

    from ensemble_rm import FunctionScorer, RewardEnsemble
    from ensemble_rm.aggregation import mean
    from ensemble_rm.calibration import Normaliser
    from ensemble_rm.server.lifecycle import serve
    from ensemble_rm.server.options import NetworkOptions

    def load() -> RewardEnsemble:
        members = (
            FunctionScorer("length", lambda s: float(len(s.completion))),
            FunctionScorer("words", lambda s: float(len(s.completion.split()))),
        )
        return RewardEnsemble(members, Normaliser.identity(2), mean())

    # Signals belong to the main thread, which sends the requests.
    uvicorn.Server.capture_signals = contextmanager(lambda _: (yield))  # type: ignore[method-assign]
    ports: list[int] = []
    bound = threading.Event()

    def listening(_: str, port: int) -> None:
        ports.append(port)
        bound.set()

    threading.Thread(
        target=serve,
        args=(load,),
        kwargs={"network": NetworkOptions(port=0), "listening": listening},
        daemon=True,
    ).start()
    assert bound.wait(60)
    body = json.dumps({"samples": [{"prompt": "Hello?", "completion": "Yes, I am here."}]})

    def post() -> bool:
        connection = HTTPConnection("127.0.0.1", ports[0], timeout=60)
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status in (200, 503), text
        return answer.status == 200

    while not post():  # 503 until the ensemble is loaded
        sleep(0.1)
    return post


WAYS: dict[str, Callable[[Path, int], Callable[[], Any]]] = {
    "score": prepare_score,
    "score_again": prepare_score_again,
    "recalibrate": prepare_recalibrate,
    "http": prepare_http,
    "train": prepare_train,
}


def record(way: str, size: int) -> dict[str, Any]:
    """Record one way in this process."""
    import torch

    torch.set_num_threads(1)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        run = WAYS[way](Path(folder), size)
        with recorder.record():
            run()
    return recorder.result()


# The report --------------------------------------------------------------------------------------


def counted(way: str, files: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the files that count on a way."""
    if not way.startswith("score"):
        return files
    return {name: functions for name, functions in files.items() if not name.startswith(CPU_ONLY)}


def report(results: dict[str, dict[str, Any]], figures: Figures) -> None:
    for way, result in results.items():
        files = counted(way, result["files"])
        figures.add_value(f"{way}_files", len(files))
        figures.add_value(f"{way}_functions", sum(map(len, files.values())))
    figures.add_value("score_frames", len(results["score"]["frames"]))
    print("\n| figure | measured | goal |\n| --- | --- | --- |")
    for name, goal in GOALS.items():
        value = int(figures.figures[name]["median"])
        print(f"| {name} | {value} | ≤ {goal}{'' if value <= goal else ', missed'} |")


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the files of each way, and the frames of `score`."""
    for way, result in results.items():
        files = counted(way, result["files"])
        print(f"\n{way}: {len(files)} files")
        for name, functions in files.items():
            print(f"  {name}: {', '.join(functions)}")
    print(f"\nscore: {len(results['score']['frames'])} frames")
    for frame in results["score"]["frames"]:
        print(f"  {frame}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="print the files of each way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = 60 if args.quick else 120
    if args.way:
        print(json.dumps(record(args.way, size)))
        return
    figures = Figures(args)
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way] + ["--quick"] * args.quick
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr}")
        results[way] = json.loads(done.stdout.splitlines()[-1])
    report(results, figures)
    if args.list:
        show(results)
    figures.write()


if __name__ == "__main__":
    main()
