"""Cost and diversity of each kind of member.

Pairs of hh_rlhf's harmless-base, split by prompt for each seed: 1,000 to train, 140 for early
stopping and the normaliser, 180 for the temperature, the rest to test; 256 tokens, bfloat16, one
thread, three members a run, at most --epochs epochs with a patience of 1. Texts unlike the training
data are pairs of tldr.jsonl. Every recipe that makes members differ is switched on by itself.

Figures, over seeds: accuracy, calibrated NLL and its gain over heads of one view on the same pairs,
pooling gain (all in nats), mean correlation of the members' margins, AUROC of the spread of margins
and of −|margin| as detectors of errors, share of pairs whose members disagree on the winner, on
test pairs and on unlike ones, CPU seconds of training, and the cost of scoring: CPU seconds over
those of one whole model of the same backbone, groups of 16 completions.

Runs are kept in a work folder: a run that was cut goes on, and two processes may share the work
(--backbones, --ways, --seeds). --kept reports what is there and trains nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.quality.kind_runs import BLOCKS, Sizes, Study, Way
from benchmarks.shared.common import OVER_PROMPTS, SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import calibrated, package_folder
from ensemble_rm import Preferences, load_preferences
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import ScoredPairs, fit_normaliser
from ensemble_rm.calibration.methods.temperature import pooling_gain
from ensemble_rm.errors import NoPositiveTemperatureError
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.metrics import accuracy, bootstrap, error_auroc, nll, pair_nll
from ensemble_rm.uncertainty.disagreement import margin_correlation, mean_correlation

DATA = SHARED_DATA
CACHE = Path("~/.cache/ensemble_rm").expanduser()

HEADS = (
    Way("head", "head"),
    Way("head_bootstrap", "head", recipe={"bootstrap": True}),
    Way("head_subspace", "head", recipe={"subspace": 0.5}),
    Way("head_both", "head", recipe={"bootstrap": True, "subspace": 0.5}),
    Way("views", "head", views="spread"),
    Way("views_bootstrap", "head", views="spread", recipe={"bootstrap": True}),
    Way("views_subspace", "head", views="spread", recipe={"subspace": 0.5}),
    Way("views5", "head", views="spread"),
)


def branch(blocks: int, name: str = "", **recipe: Any) -> Way:
    return Way(f"branch{blocks}{name}", "branch", blocks, recipe=recipe)


# In the order of the work: what matters most, and costs least, first.
WAYS: dict[str, tuple[Way, ...]] = {
    "minilm": (
        *HEADS,
        *(branch(m) for m in BLOCKS["minilm"]),
        Way("full", "full", recipe={"learning_rate": 1e-4}),
        branch(2, "_bootstrap", bootstrap=True),
        branch(2, "_fresh", reinitialise=1),
        branch(2, "_dropout", dropout=None),
        branch(2, "_subspace", subspace=0.5),
        branch(2, "_fitted", first_head="fitted"),
        Way("lora", "lora"),
        Way("lora_nuclear", "lora", recipe={"diversity": 0.1}),
        Way("lora_warm", "lora", warm_start=True),
    ),
    "smollm2": (
        *HEADS,
        *(branch(m) for m in BLOCKS["smollm2"][:3]),
        branch(2, "_fitted", first_head="fitted"),
        branch(2, "_bootstrap", bootstrap=True),
        branch(2, "_fresh", reinitialise=1),
        branch(8),
        Way("lora", "lora"),
    ),
}


# Ensembles -----------------------------------------------------------------------------------


def scored(study: Study, runs: list[dict[str, np.ndarray]], seed: int) -> dict[str, ScoredPairs]:
    """Return the parts, scored by the members of several runs side by side."""
    rows = study.rows(seed)
    raw = {
        part: np.concatenate([run[part] for run in runs], axis=1)
        for part in ("validation", "calibration", "test", "unlike")
    }
    normaliser = fit_normaliser(raw["validation"], study.data(rows["validation"]).sample_groups())
    found = {}
    for part, scores in raw.items():
        pairs, n = study.data(rows[part]), len(scores) // 2
        z = normaliser(scores)
        found[part] = ScoredPairs(z[:n], z[n:], pairs.targets, pairs.weights, pairs.groups)
    return found


def disagreement(pairs: ScoredPairs) -> float:
    """Return the share of pairs whose members do not all prefer the same side."""
    signs = np.sign(pairs.member_margins)
    return float((signs != signs[:, :1]).any(axis=1).mean())


def measure(parts: dict[str, ScoredPairs]) -> tuple[dict[str, float], np.ndarray]:
    """Return the figures of one ensemble under one seed, and its calibrated P(chosen)."""
    test = parts["test"]
    margins, pooled = test.member_margins, test.margins(mean())
    p = calibrated(parts["calibration"].margins(mean()), parts["calibration"], pooled)
    found = {
        "accuracy": accuracy(p, test.targets),
        "nll": nll(p, test.targets),
        "correlation": mean_correlation(margin_correlation(margins)),
        "error_auroc_std": error_auroc(p, test.targets, margins.std(axis=1)),
        "error_auroc_margin": error_auroc(p, test.targets, -np.abs(pooled)),
        "disagreement": disagreement(test),
        "disagreement_unlike": disagreement(parts["unlike"]),
    }
    try:
        found["pooling_gain"] = pooling_gain(margins, pooled, test.targets)
    except NoPositiveTemperatureError as error:
        print(f"no pooling gain: {error}")
    return found, p


def report(
    name: str,
    ensembles: dict[int, tuple[Study, dict[str, ScoredPairs], float]],
    peers: dict[int, np.ndarray],
    figures: Figures,
) -> dict[int, np.ndarray]:
    """Add an ensemble's figures over its seeds; return its P(chosen) a seed."""
    each: dict[str, list[float]] = {}
    p_of: dict[int, np.ndarray] = {}
    for seed, (_, parts, seconds) in ensembles.items():
        found, p_of[seed] = measure(parts)
        if seconds:
            found["train_seconds"] = seconds
        for figure, value in found.items():
            each.setdefault(figure, []).append(value)
    for figure, values in each.items():
        figures.add_repeats(f"{figure}_{name}", values, over="seeds")
    shared = [seed for seed in ensembles if seed in peers]
    if shared:
        gains, prompts = [], []
        for seed in shared:
            study, parts, _ = ensembles[seed]
            y = parts["test"].targets
            gains.append(pair_nll(peers[seed], y) - pair_nll(p_of[seed], y))
            prompts.append(study.pairs.groups[study.rows(seed)["test"]])
        gain, groups = np.concatenate(gains), np.concatenate(prompts)
        i = bootstrap(lambda chosen: float(gain[chosen].mean()), groups, draws=1000)
        figures.add(f"nll_gain_{name}", i.estimate, i.low, i.high, len(gain), interval=OVER_PROMPTS)
    return p_of


def report_all(studies: dict[str, Study], seeds: list[int], figures: Figures) -> None:
    """Report every way, unequal branches, and both backbones in one ensemble."""
    peers: dict[str, dict[int, np.ndarray]] = {}
    for backbone, study in studies.items():
        kept = {
            (way.name, seed): dict(np.load(study.file(way, seed)))
            for way in WAYS[backbone]
            for seed in seeds
            if study.file(way, seed).exists()
        }
        for way in WAYS[backbone]:
            there = [seed for seed in seeds if (way.name, seed) in kept]
            found = {
                seed: (
                    study,
                    scored(study, [kept[way.name, seed]], seed),
                    float(kept[way.name, seed]["seconds"]),
                )
                for seed in there
            }
            p = report(f"{backbone}_{way.name}", found, peers.get(backbone, {}), figures)
            if way.name == "head":
                peers[backbone] = p
        unequal = [f"branch{m}" for m in BLOCKS[backbone][:3]]
        mixed = {
            seed: (study, scored(study, _one_of_each(kept, unequal, seed), seed), 0.0)
            for seed in seeds
            if all((name, seed) in kept for name in unequal)
        }
        report(f"{backbone}_branch_unequal", mixed, peers.get(backbone, {}), figures)
    if len(studies) == 2:
        for name in ("views", "branch2"):
            _report_both(studies, name, seeds, peers.get("smollm2", {}), figures)


def _one_of_each(
    kept: dict[tuple[str, int], dict[str, np.ndarray]], names: list[str], seed: int
) -> list[dict[str, np.ndarray]]:
    """Return one member of each run, another one of each."""
    return [
        {part: array[:, i : i + 1] for part, array in kept[name, seed].items() if array.ndim == 2}
        for i, name in enumerate(names)
    ]


def _report_both(
    studies: dict[str, Study],
    name: str,
    seeds: list[int],
    peers: dict[int, np.ndarray],
    figures: Figures,
) -> None:
    found = {}
    for seed in seeds:
        files = [
            study.work / f"{name}-{seed}.npz" for study in (studies["minilm"], studies["smollm2"])
        ]
        if all(file.exists() for file in files):
            runs = [dict(np.load(file)) for file in files]
            study = studies["smollm2"]
            found[seed] = (study, scored(study, runs, seed), 0.0)
    report(f"both_{name}", found, peers, figures)


# The cost of scoring -------------------------------------------------------------------------


def costs(studies: dict[str, Study], args: argparse.Namespace, figures: Figures) -> None:
    """Add CPU seconds of scoring over those of one whole model, in turn."""
    import tempfile

    from benchmarks.shared import scoring_sides as scoring
    from ensemble_rm.members import FullScorer

    for backbone, study in studies.items():
        options, k = study.options, study.sizes.members
        with tempfile.TemporaryDirectory() as folder:
            one = scoring.make_classifier(study.backbone, Path(folder) / "model")
            whole = FullScorer.from_name(one, options)
            sides: dict[str, Any] = {
                "one": whole,
                "views": scoring.heads(study.backbone, options, k),
                "lora": scoring.adapters(study.backbone, options, k),
            }
            for m in BLOCKS[backbone]:
                sides[f"branch{m}"] = scoring.branches(study.backbone, options, m, k)
            samples = scoring.groups(
                argparse.Namespace(data=args.data / "hh_rlhf.jsonl", prompts=args.prompts),
                study.trunk.encoder.tokenizer,
            )
            took: dict[str, list[float]] = {name: [] for name in sides}
            for repeat in range(args.repeats + 1):
                for name, scorer in sides.items():
                    began = time.process_time()
                    scorer.score(samples)
                    if repeat:
                        took[name].append(time.process_time() - began)
        for name, values in took.items():
            if name != "one":
                ratios = list(np.array(values) / np.array(took["one"]))
                figures.add_repeats(f"cost_{backbone}_{name}", ratios)
        figures.add_value(f"cost_{backbone}_full", k)  # k whole models


# The picture ---------------------------------------------------------------------------------

COLOURS = {"minilm": "#2b6cb0", "smollm2": "#c05621"}
LABELS = {"minilm": "MiniLM-L6", "smollm2": "SmolLM2-135M"}


def cost_of(name: str, backbone: str, figures: dict[str, Any]) -> float | None:
    """Return the cost of scoring of a way."""
    base = name.split("_", maxsplit=1)[0]
    if base in ("head", "views", "views5"):
        base = "views"
    found = figures.get(f"cost_{backbone}_{base}")
    return None if found is None else float(found["median"])


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw cost against pooling gain and NLL; ways of one cost stand side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    beside: dict[float, int] = {}
    for backbone, way in ((b, way) for b in COLOURS for way in WAYS[b]):
        cost = cost_of(way.name, backbone, figures)
        if cost is None or f"nll_{backbone}_{way.name}" not in figures:
            continue
        beside[cost] = beside.get(cost, -1) + 1
        x, plain = cost * 1.015 ** beside[cost], "_" not in way.name
        for axis, metric in zip(axes, ("pooling_gain", "nll"), strict=True):
            found = figures.get(f"{metric}_{backbone}_{way.name}")
            if found is None:
                continue
            middle = found["median"]
            axis.errorbar(
                *(x, middle, [[middle - found["low"]], [found["high"] - middle]]),
                fmt="o" if plain else ".",
                color=COLOURS[backbone],
                alpha=1 if plain else 0.4,
                lw=0.8,
                label=LABELS[backbone] if way.name == "head" else None,
            )
            if plain:
                name = way.name.replace("branch", "m = ")
                style = {"fontsize": 7, "color": COLOURS[backbone]}
                axis.annotate(name, (x, middle), xytext=(5, 3), textcoords="offset points", **style)
    for axis, label in zip(
        axes, ("pooling gain, nats (higher is better)", "NLL, nats (lower is better)"), strict=True
    ):
        axis.set_xscale("log")
        axis.set_xlabel("cost of scoring three members, in whole models of the backbone")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# The command ---------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Preferences, Preferences]:
    pairs = load_preferences(args.data / "hh_rlhf.jsonl")
    pairs = pairs.take(np.flatnonzero(np.array(pairs.subsets) == "harmless-base"))
    unlike = load_preferences(args.data / "tldr.jsonl")
    if args.quick:
        pairs = pairs.take(np.random.default_rng(0).permutation(len(pairs))[:120])
    return pairs, unlike.take(np.random.default_rng(0).permutation(len(unlike))[: args.unlike])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--cache-dir", type=Path, default=CACHE)
    parser.add_argument("--work", type=Path, default=CACHE / "kinds")
    parser.add_argument("--backbones", nargs="+", choices=list(WAYS), default=list(WAYS))
    names = sorted({way.name for way in chain(*WAYS.values())})
    parser.add_argument("--ways", nargs="+", choices=names, metavar="WAY", help="train these alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kept", action="store_true", help="report what the work folder holds")
    parser.add_argument("--train-only", action="store_true", help="report nothing")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--fit", type=int, default=1000, metavar="PAIRS")
    parser.add_argument("--epochs", type=int, default=1, help="at most")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--unlike", type=int, default=150, metavar="PAIRS")
    parser.add_argument("--prompts", type=int, default=2, help="scored for the cost")
    parser.add_argument("--repeats", type=int, default=5, help="of the cost")
    parser.add_argument("--picture", type=Path, help="where the picture is drawn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(args.fit, 140, 180, args.unlike, args.members, args.epochs, args.max_length)
    if args.quick:
        args.backbones, args.seeds, args.prompts, args.repeats = ["minilm"], [0], 1, 1
        args.work, args.unlike, args.ways = args.work / "quick", 20, ["head", "views", "branch1"]
        sizes = Sizes(60, 16, 20, 20, 2, 1, 48)
    pairs, unlike = load(args)
    studies = {
        name: Study(
            name,
            locate(package_folder(name), cache_dir=args.cache_dir),
            pairs,
            unlike,
            sizes,
            work=args.work,
            cache_dir=args.cache_dir,
        )
        for name in args.backbones
    }
    for name, study in studies.items():
        for way in WAYS[name]:
            if args.kept or (args.ways and way.name not in args.ways):
                continue
            for seed in args.seeds:
                study.run(way, seed)
    if args.train_only:
        return
    figures = Figures(args)
    report_all(studies, args.seeds, figures)
    costs(studies, args, figures)
    figures.write()
    if args.picture:
        draw(figures.found, args.picture)


if __name__ == "__main__":
    main()
