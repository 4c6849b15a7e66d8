"""Heads on MiniLM-L6, here and in RewardUQ 0.1.0: how good, how fast.

Both sides get the same pairs (hh_rlhf.jsonl, harmless-base), the same frozen backbone, five heads,
the same epochs, one thread and float32. They run in turn, each run in a process of its own, in an
order that alternates; RewardUQ in its own environment, which `rewarduq_peer.py` drives and which is
made at the first run if --peer-python names none. Pairs with a side longer than --max-length tokens
are left out, since RewardUQ drops those and we would cut them.

A seed is a fold by prompt and the seed of the heads: a fifth of the pairs is the test, the others
are dealt to training, validation and calibration. RewardUQ has no early stopping, so it trains on
training and validation together; we stop early on the validation part and do not train on it.
Everyone gets one temperature, fitted by `fit_temperature` on the same calibration judgments. ECE is
RewardUQ's own: 20 equal-width bins over pairs and their flips. `raw` is σ of the mean of the heads'
raw margins.

RewardUQ runs as its configs/method/mlp_head_ensemble/default.yaml says, but for precision, number
of heads and, in its favour, epochs and learning rate (three at 1e-3, of those that were tried the
best for it): at its defaults, one epoch at 1e-4, it does not leave chance on pairs as few as these.

Wall time is from texts to scores and metrics on calibration and test pairs: loading the backbone,
tokenising, reading, training, evaluating; imports are reported apart. No feature is cached before.
`cpu` is the same work in processor seconds, which a busy machine disturbs less.
`score` is the time of 2·n new texts of another subset, warm: `ensemble.score` here, the steps of
`scripts/run_inference.py` there. Ratios are theirs/ours, above 1 is in our favour. Gains are ours
against theirs, positive is better, with bootstraps over prompts, all seeds pooled.

`_default` is our default recipe instead of the same epochs; `_bfloat16` is our trunk in bfloat16
against RewardUQ in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import CHANCE, OVER_PROMPTS, SHARED_DATA, Figures, make_parser

if TYPE_CHECKING:  # the side's imports are timed
    from ensemble_rm import Preferences, RewardEnsemble

HERE = Path(__file__).resolve()
DATA = SHARED_DATA / "hh_rlhf.jsonl"
ENVIRONMENT = Path("~/.cache/ensemble_rm/rewarduq-venv").expanduser()
NEEDS = ("torch==2.13.0", "rewarduq==0.1.0", "transformers>=4.56,<5", "huggingface-hub<1")
MEMBERS, BINS = 5, 20


def fitting(pairs: Preferences, backbone: Path, max_length: int) -> tuple[Preferences, np.ndarray]:
    """Return the pairs whose two sides fit `max_length`, and tokens a pair."""
    from ensemble_rm.members.backbone.checkpoint import load_tokenizer
    from ensemble_rm.members.encoding import TextEncoder

    encoder = TextEncoder(load_tokenizer(backbone), max_length=100_000)
    tokens = np.array([len(e.ids) for e in encoder.encode(pairs.samples())]).reshape(2, -1)
    rows = np.flatnonzero((tokens <= max_length).all(axis=0))
    return pairs.take(rows), tokens[:, rows].sum(axis=0)


def parts(pairs: Preferences, fold: int, folds: int) -> dict[str, np.ndarray]:
    """Deal the pairs by prompt: rows of fit, validation, calibration and test."""
    dealt = pairs.folds(folds, seed=0)
    rest = np.concatenate([rows for f, rows in enumerate(dealt) if f != fold])
    chosen = pairs.take(rest)
    place = {id(pair): row for pair, row in zip(chosen, rest, strict=True)}
    split = chosen.split(0.7, 0.1, 0.2, seed=fold)
    found = {
        name: np.array([place[id(pair)] for pair in part])
        for name, part in zip(("fit", "validation", "calibration"), split, strict=True)
    }
    return found | {"test": dealt[fold]}


def to_rows(pairs: Preferences) -> list[dict[str, Any]]:
    from ensemble_rm.data.samples import prompt_json

    def turns(prompt: Any) -> Any:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    return [
        {"prompt": turns(prompt_json(p.prompt)), "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    ]


def ece_with_flips(p: np.ndarray, bins: int = BINS) -> float:
    """RewardUQ's ECE: pairs (label 1) and their flips (label 0) in equal-width bins."""
    both = np.concatenate([p, 1 - p])
    label = np.concatenate([np.ones_like(p), np.zeros_like(p)])
    place = np.digitize(both, np.linspace(0.0, 1.0, bins + 1)[1:-1])
    return float(
        sum(
            (place == b).mean() * abs(label[place == b].mean() - both[place == b].mean())
            for b in np.unique(place)
        )
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def calibrated(held: np.ndarray, groups: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Probabilities of test pairs at the temperature of the calibration pairs; ½ if none fits."""
    from ensemble_rm.calibration import fit_temperature
    from ensemble_rm.errors import NoPositiveTemperatureError

    try:
        # The margins are chosen-first; the fit does not see orientation.
        fit = fit_temperature(held, np.ones(len(held)), groups=groups, min_judgments=2)
    except NoPositiveTemperatureError as error:
        print(f"no temperature: {error}")
        return np.full(len(test), 0.5)
    return sigmoid(test / fit.temperature)


def credit(p: np.ndarray) -> np.ndarray:
    from ensemble_rm.metrics import agreement

    return agreement(p, np.ones_like(p))


def nll_of(p: np.ndarray) -> np.ndarray:
    from ensemble_rm.metrics import pair_nll

    return pair_nll(p, np.ones_like(p))


def side_ours(job: dict[str, Any]) -> dict[str, Any]:
    """One run of ours, in a process of its own."""
    began = perf_counter()
    import torch
    from transformers import AutoModel, AutoTokenizer  # noqa: F401  the library imports them late

    from ensemble_rm import Preference, Preferences, TrunkOptions, train
    from ensemble_rm.data.samples import as_prompt
    from ensemble_rm.members import HeadRecipe
    from ensemble_rm.metrics import accuracy, ece, nll

    imports = perf_counter() - began
    torch.set_num_threads(job["threads"])

    def read(rows: list[dict[str, Any]]) -> Preferences:
        pairs = (Preference(as_prompt(r["prompt"]), r["chosen"], r["rejected"]) for r in rows)
        return Preferences(tuple(pairs))

    def run(recipe: HeadRecipe) -> tuple[RewardEnsemble, np.ndarray]:
        ensemble = train(
            read(job["fit"]),
            read(job["validation"]),
            backbone=job["backbone"],
            members=MEMBERS,
            seed=job["seed"],
            options=TrunkOptions(max_length=job["max_length"], dtype=job["dtype"]),
            recipe=recipe,
            cache_dir=job["cache"],
        )
        scores = ensemble.score(read(job["evaluation"]).samples())
        both = np.stack([scores.reward, scores.raw.mean(axis=1)]).reshape(2, 2, -1)
        margins = both[:, 0] - both[:, 1]
        p, one = sigmoid(margins[1]), np.ones(margins.shape[1])
        print({"accuracy": accuracy(p, one), "nll": nll(p, one), "ece": ece(p, one)})
        return ensemble, margins

    began, cpu = perf_counter(), process_time()
    ensemble, margins = run(HeadRecipe(solver="adam", epochs=job["epochs"]))
    wall, cpu = perf_counter() - began, process_time() - cpu
    fresh, took = read(job["fresh"]).samples(), []
    for repeat in range(job["score_repeats"] + 1):
        began = perf_counter()
        ensemble.score(fresh)
        if repeat:  # the first warms up
            took.append(perf_counter() - began)
    found = {"imports": imports, "wall": wall, "cpu": cpu, "score": took}
    found["margins"] = margins.tolist()
    if job["default"]:
        found["margins_default"] = run(HeadRecipe())[1].tolist()
    return found


def peer_is_installed() -> bool:
    return any(ENVIRONMENT.glob("lib/python*/site-packages/rewarduq"))


def peer_python(given: Path | None) -> Path:
    """Return RewardUQ's interpreter; make its environment where there is none."""
    python = given or ENVIRONMENT / "bin" / "python"
    if given is None and not peer_is_installed():
        print(f"making RewardUQ's environment in {ENVIRONMENT}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *NEEDS], check=True)
    return python


def run_side(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Run one side on one job in a fresh process, with nothing cached, and read its answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, out = folder / "job.json", folder / "out.json"
        file.write_text(json.dumps(job | {"out": str(out), "cache": str(folder / "cache")}))
        threads = str(job["threads"])
        more = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        done = subprocess.run(
            [*command, str(file)],
            env=os.environ | more,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(out.read_text())
        return answer


def one_seed(
    fold: int, pairs: Preferences, tokens: np.ndarray, fresh: Preferences, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Run every side on one fold; return the parts' rows and the answers."""
    rows = parts(pairs, fold, args.folds)
    data = {name: to_rows(pairs.take(chosen)) for name, chosen in rows.items()}
    job = {
        "backbone": str(args.backbone),
        "members": MEMBERS,
        "seed": fold,
        "threads": args.threads,
        "epochs": args.epochs,
        "max_length": args.max_length,
        "dtype": "float32",
        "evaluation": data["calibration"] + data["test"],
        "fresh": to_rows(fresh),
        "score_repeats": args.score_repeats,
    }
    ours = job | {"fit": data["fit"], "validation": data["validation"], "default": True}
    theirs = job | {
        "train": data["fit"] + data["validation"],
        "pooling": args.peer_pooling,
        "learning_rate": args.peer_learning_rate,
        "regularisation": 0.1,
    }
    here = [sys.executable, str(HERE), "--side"]
    there = [str(args.peer_python), str(HERE.parent / "rewarduq_peer.py")]
    runs = {"ours": (here, ours), "rewarduq": (there, theirs)}
    order = list(runs) if fold % 2 else list(runs)[::-1]
    found = {}
    for name in order:
        found[name] = run_side(*runs[name])
        print(f"seed {fold}: {name} {found[name]['wall']:.1f} s", flush=True)
    found["ours_bfloat16"] = run_side(here, ours | {"dtype": "bfloat16", "default": False})
    check_peer(found["rewarduq"], int(tokens.sum()))
    return rows, found


def check_peer(answer: dict[str, Any], tokens: int) -> None:
    """Stop where RewardUQ read other tokens, or its ECE is not the one that is used here."""
    if answer["tokens"] != tokens:
        raise SystemExit(f"RewardUQ read {answer['tokens']} tokens, not {tokens}")
    own, said = ece_with_flips(sigmoid(np.array(answer["margins"]))), answer["ece"]
    if abs(own - said) > 1e-4:
        raise SystemExit(f"RewardUQ says ECE {said}, its definition as written here {own}")


def judged(
    rows: dict[str, Any], found: dict[str, dict[str, Any]], groups: np.ndarray
) -> dict[str, np.ndarray]:
    """Probabilities of the fold's test pairs, by side, raw and calibrated."""
    held_groups, n = groups[rows["calibration"]], len(rows["calibration"])
    margins = {"rewarduq": (found["rewarduq"]["margins"],) * 2}
    for name, key, side in (
        ("ours", "margins", "ours"),
        ("ours_default", "margins_default", "ours"),
        ("ours_bfloat16", "margins", "ours_bfloat16"),
    ):
        margins[name] = tuple(found[side][key])
    p = {}
    for name, (pooled, raw) in margins.items():
        pooled = np.array(pooled)
        p[name] = calibrated(pooled[:n], held_groups, pooled[n:])
        p[f"raw_{name}"] = sigmoid(np.array(raw)[n:])
    return p


def report_quality(
    by_seed: list[dict[str, np.ndarray]], groups: np.ndarray, figures: Figures
) -> None:
    """Figures a seed, and gains and ECE over all seeds' test pairs."""
    from ensemble_rm.metrics import bootstrap, ece_null

    for name in by_seed[0]:
        figures.add_repeats(
            f"accuracy_{name}", [float(credit(p[name]).mean()) for p in by_seed], over="seeds"
        )
        figures.add_repeats(
            f"nll_{name}", [float(nll_of(p[name]).mean()) for p in by_seed], over="seeds"
        )
        figures.add_repeats(f"ece_{name}", [ece_with_flips(p[name]) for p in by_seed], over="seeds")
    pooled = {name: np.concatenate([p[name] for p in by_seed]) for name in by_seed[0]}
    n = len(groups)

    def add(name: str, values: np.ndarray) -> None:
        i = bootstrap(lambda rows: float(values[rows].mean()), groups, draws=1000)
        figures.add(name, i.estimate, i.low, i.high, n, interval=OVER_PROMPTS)

    peer = pooled["rewarduq"]
    for name in ("ours", "ours_default", "ours_bfloat16"):
        add(f"accuracy_gain_{name}", credit(pooled[name]) - credit(peer))
        add(f"nll_gain_{name}", nll_of(peer) - nll_of(pooled[name]))
    add("nll_gain_raw_ours", nll_of(pooled["raw_rewarduq"]) - nll_of(pooled["raw_ours"]))
    for name in ("ours", "rewarduq", "ours_bfloat16"):
        p, null = pooled[name], ece_null(pooled[name])
        i = bootstrap(lambda rows, p=p: ece_with_flips(p[rows]), groups, draws=200)
        figures.add(f"ece_pooled_{name}", i.estimate, i.low, i.high, n, interval=OVER_PROMPTS)
        figures.add(f"ece_null95_{name}", null.upper95, null.low, null.high, n, interval=CHANCE)


def report_time(found: list[dict[str, dict[str, Any]]], figures: Figures) -> None:
    """Seconds and ratios, a seed each."""
    sides = ("ours", "rewarduq", "ours_bfloat16")
    imports = {s: [run[s]["imports"] for run in found] for s in sides}
    wall = {s: [run[s]["wall"] for run in found] for s in sides}
    cpu = {s: [run[s]["cpu"] for run in found] for s in sides}
    score = {s: [float(np.median(run[s]["score"])) for run in found] for s in sides}
    for name, took in (("wall", wall), ("cpu", cpu), ("score", score)):
        for side, suffix in (("ours", ""), ("ours_bfloat16", "_bfloat16")):
            ratios = [a / b for a, b in zip(took["rewarduq"], took[side], strict=True)]
            figures.add_repeats(f"{name}_ratio{suffix}", ratios, over="seeds")
        for side in sides:
            figures.add_repeats(f"{name}_seconds_{side}", took[side], over="seeds")
    for side in ("ours", "rewarduq"):
        figures.add_repeats(f"import_seconds_{side}", imports[side], over="seeds")


def options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--backbone", type=Path, help="in place of MiniLM-L6 as packaged")
    parser.add_argument("--peer-python", type=Path, help="of an environment that has RewardUQ")
    parser.add_argument("--peer-pooling", default="last", choices=("last", "mean"))
    parser.add_argument("--peer-learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folds, args.score_repeats, args.fresh, args.pairs = 5, 2, 50, None
    if args.quick:
        args.max_length, args.seeds, args.pairs = 80, 1, 180
        args.score_repeats, args.fresh = 1, 8
    return args


def main() -> None:
    args = options()
    if args.side:
        job = json.loads(args.side.read_text())
        Path(job["out"]).write_text(json.dumps(side_ours(job)))
        return
    import torch

    from ensemble_rm import load_preferences
    from ensemble_rm.demo.data import packaged_backbone

    torch.set_num_threads(args.threads)
    args.backbone = args.backbone or packaged_backbone()
    args.peer_python = peer_python(args.peer_python)
    figures = Figures(args)
    every = load_preferences(args.data)
    subset = np.array(every.subsets)
    chosen = every.take(np.flatnonzero(subset == "harmless-base"))
    other = every.take(np.flatnonzero(subset == "helpful-base"))
    pairs, tokens = fitting(chosen, args.backbone, args.max_length)
    fresh = fitting(other, args.backbone, args.max_length)[0][: args.fresh]
    pairs, tokens = pairs[: args.pairs], tokens[: args.pairs]
    print(f"{len(pairs)} of {len(chosen)} pairs fit, {tokens.sum()} tokens", flush=True)
    found, by_seed, order = [], [], []
    for fold in range(args.seeds):
        rows, answers = one_seed(fold, pairs, tokens, fresh, args)
        by_seed.append(judged(rows, answers, pairs.groups))
        found.append(answers)
        order.append(rows["test"])
        print(f"seed {fold}: load {os.getloadavg()[0]:.2f}", flush=True)
    report_quality(by_seed, pairs.groups[np.concatenate(order)], figures)
    report_time(found, figures)
    figures.write()


if __name__ == "__main__":
    main()
