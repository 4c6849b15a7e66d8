"""How much over-optimisation an ensemble prevents, where gold is known exactly.

Best of n by the proxy, n from 1 to 12,500 by the unbiased estimator on 12,600 samples; four such
draws a repeat. Labels are Bradley–Terry's, clean or with 25 % flipped. `single` is the mean of the
five members' own curves. Three kinds of members: five MLPs, seeds apart; five linear heads on one
layer of a shared random network (`heads`), each on a bootstrap of the pairs; the same heads, each
on a layer of its own (`views`). Every formula is the library's: normaliser, aggregators, best-of-n.

λ of UWO, κ of LCB and β of the entropic aggregator are tuned on other seeds, for MLPs under noise:
the highest gold at n = 12,500. `uwo_paper` (λ = ½) and `lcb_paper` (κ = 1) are the papers' own.

`removed_CASE_AGG` is the share of the single model's (peak − final) that the aggregator's curve
lacks, given only where the single model's drop exceeds its 95 % interval. Brackets are a
bootstrap's over repeats. `heads_…` and `views_…` are measured against their own single members.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.overoptimisation.curve_figures import Curves, Interval
from benchmarks.overoptimisation.synthetic_world import (
    Score,
    World,
    draw,
    head_members,
    make_world,
    mlp_members,
)
from benchmarks.shared.common import ROOT, Figures, make_parser
from ensemble_rm.aggregation import Aggregator, entropic, lcb, mean, minimum, uwo
from ensemble_rm.best_of_n import best_of_n_curve, best_of_n_kl, fit_curve
from ensemble_rm.calibration import fit_normaliser

MEMBERS, SAMPLES, DRAWS = 5, 12_600, 4
SIZES = [2**i for i in range(14)] + [12_500]
CASES = {"clean": 0.0, "noise": 0.25}
KINDS = ("mlp", "heads", "views")
TUNING = 10_000  # seeds from here on tune, those below are measured
GRID = {
    "uwo": [uwo(x) for x in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)],
    "lcb": [lcb(x) for x in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)],
    "entropic": [entropic(x) for x in (2.0, 1.0, 0.5, 0.2, 0.1, 0.05)],
}
FIXED = {"mean": mean(), "minimum": minimum(), "uwo_paper": uwo(0.5), "lcb_paper": lcb(1.0)}
SHOWN = ("single", "mean", "minimum", "uwo", "lcb", "entropic")


def train(kind: str, world: World, seed: int) -> Score:
    if kind == "mlp":
        return mlp_members(world, MEMBERS, seed=seed)
    return head_members(world, MEMBERS, views=kind == "views", seed=seed)


def one_repeat(
    kind: str, flipped: float, seed: int, aggregators: Mapping[str, Aggregator]
) -> dict[str, np.ndarray]:
    """Return each arm's gold at every n, in standard deviations of the policy's."""
    rng = np.random.default_rng(seed)
    world = make_world(rng, flipped=flipped)
    score = train(kind, world, seed)
    labelled = score(np.concatenate([world.chosen, world.rejected]))
    normaliser = fit_normaliser(labelled, np.zeros(len(labelled), dtype=np.int64))
    samples = draw(rng, DRAWS * SAMPLES)
    gold = world.gold(samples).reshape(DRAWS, SAMPLES)
    members = normaliser(score(samples))

    def curve(proxy: np.ndarray) -> np.ndarray:
        return best_of_n_curve(proxy.reshape(DRAWS, SAMPLES), gold, SIZES).mean(axis=0)

    found = {"single": np.mean([curve(column) for column in members.T], axis=0)}
    return found | {name: curve(how(members)) for name, how in aggregators.items()}


def measure(
    kind: str, case: str, seeds: range, aggregators: Mapping[str, Aggregator]
) -> dict[str, np.ndarray]:
    began = perf_counter()
    rows = [one_repeat(kind, CASES[case], seed, aggregators) for seed in seeds]
    print(f"{kind}, {case}: {len(rows)} repeats in {perf_counter() - began:.0f} s", flush=True)
    return {arm: np.array([row[arm] for row in rows]) for arm in rows[0]}


def tune(seeds: range) -> dict[str, Aggregator]:
    """Choose each coefficient by gold at the largest n, under noise, on seeds of its own."""
    every = {str(how): how for hows in GRID.values() for how in hows}
    found = measure("mlp", "noise", seeds, every)
    for name, gold in found.items():
        print(f"  {name:24s} peak {gold.mean(axis=0).max():+.2f} final {gold[:, -1].mean():+.2f}")
    return {
        name: max(hows, key=lambda how: float(found[str(how)][:, -1].mean()))
        for name, hows in GRID.items()
    }


def add(figures: Figures, name: str, found: Interval | None, n: int) -> None:
    if found is not None:
        figures.add(
            name, found.value, found.low, found.high, n, interval="95 % bootstrap over repeats"
        )


def report(figures: Figures, kind: str, case: str, curves: Curves) -> None:
    prefix, n = "" if kind == "mlp" else f"{kind}_", curves.repeats
    add(figures, f"{prefix}drop_{case}_single", curves.drop("single"), n)
    for arm in curves.gold:
        if arm != "single":
            add(figures, f"{prefix}removed_{case}_{arm}", curves.removed(arm, "single"), n)
    for arm in curves.gold:
        add(figures, f"{prefix}peak_{case}_{arm}", curves.peak(arm), n)
        add(figures, f"{prefix}final_{case}_{arm}", curves.final(arm), n)
        if arm != "single":
            gain = curves.peak_gain(arm, "single")
            add(figures, f"{prefix}peak_gain_{case}_{arm}", gain, n)
    fit = fit_curve(np.sqrt(best_of_n_kl(SIZES)), curves.gold["single"])
    add(figures, f"{prefix}gao_peak_{case}_single", Interval(fit.peak, *fit.peak_interval), n)


def picture(found: Mapping[tuple[str, str], dict[str, np.ndarray]], path: Path) -> None:
    from matplotlib.figure import Figure

    titles = {
        ("mlp", "clean"): "Five MLPs, clean labels",
        ("mlp", "noise"): "Five MLPs, 25 % flipped",
        ("heads", "noise"): "Heads on one layer, 25 % flipped",
        ("views", "noise"): "Heads with views, 25 % flipped",
    }
    colours = ["#1b3a57", "#7f8c8d", "#c0392b", "#e08e0b", "#2e8b57", "#6c5ce7"]
    root = np.sqrt(best_of_n_kl(SIZES))
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).ravel(), titles.items(), strict=True):
        for arm, colour in zip(SHOWN, colours, strict=True):
            rows = found[key][arm]
            middle, error = rows.mean(axis=0), rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
            axes.plot(
                root, middle, color=colour, label=arm, linewidth=2 if arm == "single" else 1.4
            )
            axes.fill_between(
                root, middle - 2 * error, middle + 2 * error, color=colour, alpha=0.12
            )
        best = max(found[key][arm].mean(axis=0).max() for arm in SHOWN)
        axes.set_ylim(-2.5 * best, 1.3 * best)
        axes.axhline(0, color="#d9e2ec", zorder=0)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("√KL of best-of-n (nats), at most")
        axes.set_ylabel("gold, standard deviations")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats, tuning = (3, 2) if args.quick else (args.repeats, 20)
    figures = Figures(args)
    chosen = tune(range(TUNING, TUNING + tuning))
    for name, how in chosen.items():
        figures.add_value(f"tuned_{name}", how.parameters[0][1], tuning)
    found = {}
    for kind in KINDS:
        for case in CASES:
            found[kind, case] = measure(kind, case, range(repeats), {**FIXED, **chosen})
            report(figures, kind, case, Curves(found[kind, case]))
    if not args.quick:
        picture(found, ROOT / "docs/images/overoptimisation.png")
    figures.write()


if __name__ == "__main__":
    main()
