"""How many judgments each strategy of `select` needs to reach the same NLL as random draws.

Real human preferences, hh_rlhf.jsonl, its features read once by a frozen SmolLM2-135M (--backbone
minilm: MiniLM-L6): five linear heads with a view each, solved again after every round. All arms
start from the same random pairs; each round its ensemble scores the pool of pairs that it has not
asked for, and `plan_draw` draws the next ones: by BALD, margin or disagreement, a share of them at
random, or all at random. Trained with the weights 1/π, or without. Validation pairs (the heads'
priors, the normaliser), calibration pairs (T, T_mix) and test pairs are the same random ones for
all arms, not counted, and of other prompts.

Parts: `all`, the four subsets together, and `harmless`, harmless-base alone. Figures, a part each:
`nll_random_at_N`, the calibrated test NLL; `gain_…`, random's NLL less the arm's at the same
number of judgments, paired by seed, positive is better (median, lowest, highest over seeds);
`ratio_…`, judgments that the arm needs to reach the NLL that random has at half its budget, over
those of random, below 1 is better: of the curves' means over seeds, made to fall, between the
measured numbers; low and high are 90 % of a bootstrap over seeds. A ratio of 2 says: not reached.
`effective_…`, Kish's effective size over the number of judgments at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import Budget, Part, package_folder
from ensemble_rm import Preferences, TrunkOptions, load_preferences
from ensemble_rm.active_learning.acquisition import PoolMargins, utility
from ensemble_rm.active_learning.design import plan_draw
from ensemble_rm.calibration.methods.temperature import fit_mixture_temperature, fit_temperature
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.data.weights import effective_sample_size, inclusion_weights
from ensemble_rm.errors import CalibrationError
from ensemble_rm.members import HeadRecipe
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.heads.training import solve_heads
from ensemble_rm.members.heads.weights import HeadWeights, PairFeatures
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.metrics import pair_nll

DATA = SHARED_DATA / "hh_rlhf.jsonl"
STRATEGIES = ("bald", "margin", "disagreement")
ARMS = ("random", *STRATEGIES, *(f"{name}_weighted" for name in STRATEGIES))


@dataclass(frozen=True)
class Sizes:
    """How many pairs each part has, and how many are asked for."""

    start: int
    step: int
    rounds: int
    validation: int
    calibration: int
    test: int

    @property
    def counts(self) -> np.ndarray:
        """Judgments after each round."""
        return self.start + self.step * np.arange(self.rounds + 1)


SIZES = {
    "all": Sizes(100, 150, 6, 300, 300, 1500),
    "harmless": Sizes(50, 75, 6, 150, 150, 500),
}


@dataclass
class Arm:
    """One way to ask, under one seed."""

    rows: np.ndarray
    inclusion: list[float | None]
    rounds: list[int]
    nll: list[float] = field(default_factory=list)

    def weights(self, *, weighted: bool) -> np.ndarray:
        """Return 1/π, of mean 1 in every round: each drew from what was left of the pool."""
        if not weighted:
            return np.ones(len(self.rows))
        return inclusion_weights(self.inclusion, self.rounds).weights


class Trial:
    """One seed's deal of the pairs, and what an arm's ensemble makes of them."""

    def __init__(self, part: Part, rows: np.ndarray, sizes: Sizes, seed: int) -> None:
        self.part, self.sizes, self.seed = part, sizes, seed
        groups = part.pairs.groups[rows]
        order = np.random.default_rng(seed).permutation(int(groups.max()) + 1)
        rows = rows[np.argsort(order[groups], kind="stable")]
        ends = np.cumsum([sizes.validation, sizes.calibration, sizes.test])
        self.validation, self.calibration, self.test, self.pool = np.split(rows, ends)
        self.groups = part.pairs.groups

    def fit(self, rows: np.ndarray, weights: np.ndarray) -> HeadWeights:
        data = self.part.take(rows)
        data = PairFeatures(data.features, data.targets, weights, data.margins, data.groups)
        k = len(self.part.views)
        return solve_heads(
            data,
            self.part.take(self.validation),
            view_of=list(range(k)),
            recipe=HeadRecipe(),
            seeds=member_seeds(self.seed, k),
        ).weights

    def scores(self, heads: HeadWeights, rows: np.ndarray) -> np.ndarray:
        """Raw scores of both sides, (2·n, k)."""
        x = self.part.take(rows).features
        return np.stack([heads(i, x[:, i]) for i in range(x.shape[1])], axis=1)

    def margins(self, heads: HeadWeights, *parts: np.ndarray) -> list[np.ndarray]:
        """Normalised members' margins of each part, (n, k)."""
        reference = self.scores(heads, self.validation)
        groups = self.groups[self.validation]
        normaliser = fit_normaliser(reference, np.concatenate([groups, groups]))
        found = []
        for rows in parts:
            z = normaliser(self.scores(heads, rows))
            found.append(z[: len(rows)] - z[len(rows) :])
        return found

    def value(
        self, heads: HeadWeights, held: np.ndarray, left: np.ndarray, strategy: str
    ) -> np.ndarray | None:
        """Return what the pairs that are left are worth, by the library's own formulas."""
        (asked,) = self.margins(heads, left)
        mixture = fit_mixture_temperature(held, np.ones(len(held)))
        return utility(PoolMargins(asked.mean(axis=1), asked, mixture), strategy)

    def run(self, name: str, share: float, sharpness: float) -> Arm:
        """Ask, round by round; chosen is first in the data, which no strategy sees."""
        strategy, _, weighted = name.partition("_")
        first = np.random.default_rng([self.seed, 7]).permutation(len(self.pool))
        start = self.pool[first[: self.sizes.start]]
        arm = Arm(start, [None] * len(start), [0] * len(start))
        left = self.pool[first[self.sizes.start :]]
        for step in range(self.sizes.rounds + 1):
            heads = self.fit(arm.rows, arm.weights(weighted=bool(weighted)))
            held, test = self.margins(heads, self.calibration, self.test)
            arm.nll.append(_nll(held.mean(axis=1), test.mean(axis=1)))
            if step == self.sizes.rounds:
                return arm
            design = plan_draw(
                None if strategy == "random" else self.value(heads, held, left, strategy),
                self.groups[left],
                budget=self.sizes.step,
                random_share=share,
                sharpness=sharpness,
            )
            drawn = design.draw(seed=1000 * self.seed + step)
            arm.rows = np.concatenate([arm.rows, left[drawn]])
            arm.inclusion += design.inclusion[drawn].tolist()
            arm.rounds += [step + 1] * len(drawn)
            left = np.delete(left, drawn)
        raise AssertionError


def kept(trial: Trial, arm: str, args: argparse.Namespace, name: str) -> Arm:
    """Return an arm's run from the work folder, or run it and keep it: a cut run goes on."""
    said = [trial.part.pairs.digest, trial.part.backbone.digest, name, asdict(trial.sizes)]
    said += [trial.seed, arm, args.random_share, args.sharpness]
    place = trial.part.work / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]}.json"
    if not place.exists():
        found = trial.run(arm, args.random_share, args.sharpness)
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_suffix(".new")
        scratch.write_text(json.dumps({**vars(found), "rows": found.rows.tolist()}))
        scratch.replace(place)
    stored = json.loads(place.read_text())
    return Arm(**{**stored, "rows": np.array(stored["rows"])})


def _nll(held: np.ndarray, test: np.ndarray) -> float:
    """Test NLL at the temperature of the calibration pairs; a coin's where there is none."""
    try:
        t = fit_temperature(held, np.ones(len(held))).temperature
    except CalibrationError:
        t = np.inf
    return float(pair_nll(expit(test / t), np.ones(len(test))).mean())


def needed(counts: np.ndarray, curve: np.ndarray, target: float) -> float:
    """Judgments at which a curve, made to fall, reaches the target; infinity where it does not."""
    from sklearn.isotonic import IsotonicRegression

    falling = IsotonicRegression(increasing=False).fit_transform(counts, curve)
    below = np.flatnonzero(falling <= target)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(counts[0])
    share = (falling[i - 1] - target) / (falling[i - 1] - falling[i])
    return float(counts[i - 1] + share * (counts[i] - counts[i - 1]))


def ratio(counts: np.ndarray, arm: np.ndarray, random: np.ndarray) -> float:
    """Judgments of an arm over those of random, (n_seeds, n_counts) curves, at random's middle."""
    from sklearn.isotonic import IsotonicRegression

    falling = IsotonicRegression(increasing=False).fit_transform(counts, random.mean(axis=0))
    target = float(falling[len(counts) // 2])
    return min(
        needed(counts, arm.mean(axis=0), target) / needed(counts, random.mean(axis=0), target), 2.0
    )


def report(name: str, sizes: Sizes, arms: dict[str, list[Arm]], figures: Figures) -> None:
    counts = sizes.counts
    nll = {arm: np.array([one.nll for one in found]) for arm, found in arms.items()}
    seeds = len(nll["random"])
    for at in (len(counts) // 2, len(counts) - 1):
        figures.add_repeats(
            f"nll_random_at_{counts[at]}_{name}", nll["random"][:, at].tolist(), over="seeds"
        )
        for arm in ARMS[1:]:
            gain = nll["random"][:, at] - nll[arm][:, at]
            figures.add_repeats(f"gain_{arm}_at_{counts[at]}_{name}", gain.tolist(), over="seeds")
    rng = np.random.default_rng(0)
    draws = rng.integers(seeds, size=(400, seeds))
    for arm in ARMS[1:]:
        own = [ratio(counts, nll[arm][rows], nll["random"][rows]) for rows in draws]
        low, high = np.quantile(own, [0.05, 0.95])
        figures.add(
            f"ratio_{arm}_{name}",
            ratio(counts, nll[arm], nll["random"]),
            low,
            high,
            seeds,
            interval="90 % bootstrap over seeds",
        )
    for arm in ARMS[4:]:
        sizes_of = [
            effective_sample_size(one.weights(weighted=True)) / len(one.rows) for one in arms[arm]
        ]
        figures.add_repeats(f"effective_{arm}_{name}", sizes_of, over="seeds")


def draw(results: dict[str, tuple[Sizes, dict[str, list[Arm]]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    colours = dict(zip(("random", *STRATEGIES), ("black", "C0", "C1", "C2"), strict=True))
    for axis, (name, (sizes, arms)) in zip(axes[0], results.items(), strict=True):
        for arm, found in arms.items():
            strategy, _, weighted = arm.partition("_")
            nll = np.array([one.nll for one in found])
            label = strategy + (", weighted 1/π" if weighted else "")
            style = "--" if weighted else "-"
            axis.plot(sizes.counts, nll.mean(axis=0), style, color=colours[strategy], label=label)
            if arm == "random":
                error = nll.std(axis=0, ddof=1) / np.sqrt(len(nll))
                axis.fill_between(
                    sizes.counts,
                    nll.mean(0) - error,
                    nll.mean(0) + error,
                    color="black",
                    alpha=0.15,
                )
        axis.set(title=name, xlabel="judgments", ylabel="test NLL, nats")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def load(args: argparse.Namespace) -> Part:
    pairs: Preferences = load_preferences(args.data)
    if args.quick:
        pairs = pairs.take(np.flatnonzero(np.array(pairs.subsets) == "harmless-base")[:420])
    return Part(
        "selection",
        pairs,
        backbone=locate(package_folder(args.backbone), cache_dir=args.cache_dir),
        options=TrunkOptions(max_length=48 if args.quick else 256, dtype="bfloat16"),
        budget=Budget(0, 0, 0, 0, 0, 0),
        work=args.cache_dir / "selection",
        cache_dir=args.cache_dir,
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="hh_rlhf.jsonl")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--backbone", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--parts", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--random-share", type=float, default=0.3)
    parser.add_argument("--sharpness", type=float, default=1.0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the curves, as PNG")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = dict.fromkeys(["harmless"], Sizes(40, 20, 2, 80, 80, 100)) if args.quick else SIZES
    if args.quick:
        args.backbone, args.seeds, args.parts = "minilm", 2, ["harmless"]
    figures = Figures(args)
    part = load(args)
    results = {}
    for name in args.parts:
        rows = np.arange(len(part.pairs))
        if name == "harmless":
            rows = np.flatnonzero(np.array(part.pairs.subsets) == "harmless-base")
        arms: dict[str, list[Arm]] = {arm: [] for arm in ARMS}
        for seed in range(args.seeds):
            trial = Trial(part, rows, sizes[name], seed)
            for arm in ARMS:
                arms[arm].append(kept(trial, arm, args, name))
            ends = {arm: round(found[-1].nll[-1], 4) for arm, found in arms.items()}
            print(f"{name} seed {seed}: {ends}", flush=True)
        report(name, sizes[name], arms, figures)
        results[name] = (sizes[name], arms)
    if args.picture is not None:
        draw(results, args.picture)
    figures.write()


if __name__ == "__main__":
    main()
