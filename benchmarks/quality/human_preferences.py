"""Kinds of members against a logistic regression on real human preferences, five folds by prompt.

Kinds: `head` (five heads, one view for all), `views` (a view each), `branch` (five copies of the
last two blocks) and `full` (five fine-tuned models). Backbones: SmolLM2-135M, and MiniLM-L6 under
names that end in `_minilm`; full members on MiniLM alone. The peer is a logistic regression on the
same trunk's last layer, last and mean states together, its strength chosen on the same validation
pairs. Everyone is calibrated with one temperature on the same judgments, at most 500 a fold. On
harmless-base, heads are measured on three deals of the prompts into folds, averaged pair by pair.

Parts: `all`, pairs of all four subsets of hh_rlhf.jsonl (--all-pairs); `harmless`, trained and
tested on harmless-base alone; `tldr`, 1,000 pairs of tldr.jsonl; `mtbench`, soft labels from
experts' votes. branch and full have a budget (--budget-…): at most so many pairs a fold for
training and for testing, in shorter texts; their gain is against a logistic regression on the same
pairs, whose texts are as long as heads'. Of `all` they see one fold, and test all of it. Gains are
ours against the peer, positive is better; intervals are bootstraps over prompts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import CHANCE, OVER_PROMPTS, SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import BUDGETED, Budget, Fold, K, Part, package_folder
from ensemble_rm import Preferences, TrunkOptions, load_preferences
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.metrics import agreement, bootstrap, ece, ece_null, pair_nll

DATA = SHARED_DATA
PARTS = ("harmless", "all", "tldr", "mtbench")
KINDS = {"smollm2": ("head", "views", "branch"), "minilm": ("head", "views", "branch", "full")}


def load_part(name: str, args: argparse.Namespace) -> Preferences:
    files = {"tldr": "tldr.jsonl", "mtbench": "mtbench_votes.jsonl"}
    pairs = load_preferences(args.data / files.get(name, "hh_rlhf.jsonl"))
    if name == "harmless":
        pairs = pairs.take(np.flatnonzero(np.array(pairs.subsets) == "harmless-base"))
    most = 600 if args.quick else {"all": args.all_pairs, "tldr": 1000}.get(name, len(pairs))
    if most < len(pairs):
        pairs = pairs.take(np.sort(np.random.default_rng(0).permutation(len(pairs))[:most]))
    return pairs


def pool(folds: list[Fold]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every fold's test pairs together: rows, probabilities, those of the best single members."""
    return (
        np.concatenate([fold.rows for fold in folds]),
        np.concatenate([fold.probability for fold in folds]),
        np.concatenate([fold.best_single for fold in folds]),
    )


def report(kind: str, name: str, part: Part, results: dict[str, list[Fold]], f: Figures) -> None:
    """Add the figures of one kind."""
    rows, p, best = pool(results[kind])
    peer_rows, q, _ = pool(results["budget_peer" if kind in BUDGETED else "peer"])
    assert (rows == peer_rows).all()
    tested = part.pairs.take(rows)
    y, groups = tested.targets, tested.groups

    pairs, place = np.unique(rows, return_inverse=True)  # several deals test a pair several times
    prompts = part.pairs.groups[pairs]

    def add(figure: str, values: np.ndarray) -> None:
        each = np.bincount(place, values) / np.bincount(place)
        i = bootstrap(lambda chosen: float(each[chosen].mean()), prompts, draws=1000)
        f.add(
            f"{figure}_{kind}_{name}", i.estimate, i.low, i.high, len(each), interval=OVER_PROMPTS
        )

    add("accuracy", agreement(p, y))
    add("nll", pair_nll(p, y))
    one = slice(sum(len(fold.rows) for fold in results[kind][:K]))  # each pair once: the first deal
    null = ece_null(p[one])
    i = bootstrap(lambda chosen: ece(p[one][chosen], y[one][chosen]), groups[one], draws=200)
    f.add(f"ece_{kind}_{name}", i.estimate, i.low, i.high, len(p[one]), interval=OVER_PROMPTS)
    f.add(
        f"ece_null95_{kind}_{name}", null.upper95, null.low, null.high, len(p[one]), interval=CHANCE
    )
    if kind not in ("peer", "budget_peer"):
        add("accuracy_gain", agreement(p, y) - agreement(q, y))
        add("nll_gain", pair_nll(q, y) - pair_nll(p, y))
        add("nll_gain_over_best_single", pair_nll(best, y) - pair_nll(p, y))
        gains = [fold.gain for fold in results[kind] if not np.isnan(fold.gain)]
        if gains:  # a fold whose members contradict its test pairs has none
            f.add_repeats(f"pooling_gain_{kind}_{name}", gains, over="folds")


def run(backbone: str, part_name: str, args: argparse.Namespace, figures: Figures) -> None:
    """One part on one backbone."""
    quick = args.quick
    part = Part(
        part_name + ("_minilm" if backbone == "minilm" else ""),
        load_part(part_name, args),
        backbone=locate(package_folder(backbone), cache_dir=args.cache_dir),
        options=TrunkOptions(max_length=48 if quick else args.max_length, dtype=args.dtype),
        budget=Budget(
            200 if quick else args.budget_fit,
            60 if quick else 1300 if part_name == "all" else args.budget_test,
            args.budget_held,
            1 if quick else args.budget_epochs,
            args.budget_tokens,
            1 if quick or part_name == "all" else args.budget_folds,
        ),
        work=args.work,
        cache_dir=args.cache_dir,
    )
    kinds = [kind for kind in KINDS[backbone] if kind in args.kinds]
    if part_name in ("tldr", "mtbench"):
        kinds = [kind for kind in kinds if kind in ("head", "views")]
    ways = ["peer"] if {"head", "views"} & set(kinds) else []
    ways += ["budget_peer"] if {"branch", "full"} & set(kinds) else []
    results: dict[str, list[Fold]] = {}
    for way in [*ways, *kinds]:
        deals = args.deals if part_name == "harmless" else 1
        folds = part.budget.folds if way in BUDGETED else 1 if quick else K * deals
        if args.kept and not all(part.file(way, f).exists() for f in range(folds)):
            continue
        results[way] = [part.run(way, f) for f in range(folds)]
    for way in results:
        report(way, part.name, part, results, figures)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument(
        "--work", type=Path, default=Path("~/.cache/ensemble_rm/human_preferences").expanduser()
    )
    parser.add_argument(
        "--kept", action="store_true", help="report what the work folder holds, and run nothing"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backbones", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--kinds", nargs="+", default=["head", "views", "branch", "full"])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--all-pairs", type=int, default=6301, help="of all subsets, at random")
    parser.add_argument(
        "--deals", type=int, default=3, help="of the folds, for heads on harmless-base"
    )
    parser.add_argument("--budget-fit", type=int, default=200, metavar="PAIRS")
    parser.add_argument("--budget-test", type=int, default=400, metavar="PAIRS")
    parser.add_argument("--budget-held", type=int, default=100, metavar="PAIRS")
    parser.add_argument("--budget-epochs", type=int, default=2)
    parser.add_argument("--budget-tokens", type=int, default=128, help="of branch and full")
    parser.add_argument("--budget-folds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    if args.quick:
        args.parts, args.backbones, args.work = ["harmless"], ["minilm"], args.work / "quick"
    figures = Figures(args)
    for backbone in args.backbones:
        for part in args.parts:
            run(backbone, part, args, figures)
    figures.write()


if __name__ == "__main__":
    main()
