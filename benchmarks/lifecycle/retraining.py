"""Rounds of best-of-n against a proxy whose gold is known: frozen, recalibrated, retrained.

Real completions, hh_rlhf.jsonl. Gold is five heads on SmolLM2-135M's features, fitted on every
human verdict; it prefers a side with probability σ(Δ/T), where T lets the likelier side win three
times in four. The proxies are five heads with a view each on MiniLM-L6, which share no feature with
gold, trained on 400 pairs that gold judged with that noise. A prompt has two completions here, so a
candidate's score is centred within its prompt, and best-of-n is over candidates of all prompts.

A round: the policy, best-of-32 by the current reward, picks 240 completions of prompts that were
never seen; gold judges each against its prompt's other completion. `frozen` stays what it was.
`recalibrated` fits its temperature on all judgments so far. `retrained` is the library's `retrain`:
old pairs and all judgments so far, the newest quarter for the gate, published or kept as the gate
says. `retrained_random` is the same on as many judgments of pairs drawn at random: what more data
does without the policy. `blind` publishes whatever was trained on the policy's pairs.

A temperature does not change an order: best-of-n picks the same under `recalibrated` as under
`frozen`, and gold is the same number. It changes only probabilities.

Figures, ten seeds (median, lowest, highest): `gold_…`, gold of best-of-512 on 3,000 prompts that
no round sees, unbiased, in units of gold's RMS within prompts, after the last round; `gain_…`, the
same less frozen's, paired; `nll_…`, against gold's known probabilities on the twentieth of those
prompts where the reward is surest, nats, less the entropy that gold itself has there;
`published_share`, of the rounds; `units_error`, the relative change of the reward's RMS within
prompts on the reference set, at most.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, gammaln

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import Budget, Part, package_folder
from ensemble_rm import (
    Preference,
    Preferences,
    RewardEnsemble,
    TrunkOptions,
    load_preferences,
    retrain,
    train,
)
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.errors import CalibrationError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.votes import to_preferences
from ensemble_rm.members import HeadRecipe
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.heads.training import solve_heads
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.retraining.candidate import sufficient_parts
from ensemble_rm.retraining.options import RetrainingOptions
from ensemble_rm.retraining.unit_matching import reward_units

DATA = SHARED_DATA / "hh_rlhf.jsonl"
ARMS = ("frozen", "recalibrated", "retrained", "retrained_random", "blind")
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Sizes:
    """Pairs and rounds."""

    fit: int = 400
    held: int = 150
    pool: int = 600
    asked: int = 240
    evaluated: int = 3000
    rounds: int = 4
    picked_of: int = 32
    n: int = 512


@dataclass
class Arm:
    """One arm under one seed: its ensemble, its judgments, what it reached after each round."""

    ensemble: RewardEnsemble
    judgments: list[Judgment] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    published: list[bool] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)


def gold_scores(part: Part) -> np.ndarray:
    """Gold of every completion: (2·n,) every chosen one, then every rejected one."""
    rows = np.random.default_rng(0).permutation(len(part.pairs))
    held, fit = np.split(rows, [len(rows) // 10])
    k = len(part.views)
    heads = solve_heads(
        part.take(fit),
        part.take(held),
        view_of=list(range(k)),
        recipe=HeadRecipe(),
        seeds=member_seeds(0, k),
    ).weights
    raw = np.stack([heads(i, part.read[:, i]) for i in range(k)], axis=1)
    groups = part.pairs.sample_groups()
    scores = fit_normaliser(raw, groups)(raw).mean(axis=1)
    return scores / reward_units(scores, groups).scale[0]


def noise_of(margins: np.ndarray, sure: float = 0.75) -> float:
    """T at which the likelier side wins with `sure` on average."""
    return float(brentq(lambda t: expit(np.abs(margins) / t).mean() - sure, 0.01, 100))


def best_of(proxy: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Mean gold of the proxy's best of n of the N candidates, over all subsets (Gao et al. 2022).

    Σ_{i=n..N} C(i−1, n−1)/C(N, n)·gold₍ᵢ₎, candidates sorted by the proxy; ties do not occur.
    """
    big = len(proxy)
    i = np.arange(n, big + 1)
    logs = gammaln(i) - gammaln(n) - gammaln(i - n + 1)
    logs -= gammaln(big + 1) - gammaln(n + 1) - gammaln(big - n + 1)
    return float(np.exp(logs) @ gold[np.argsort(proxy)][n - 1 :])


class World:
    """Pairs, gold, and the proxies' features, read once."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes) -> None:
        pairs = load_preferences(args.data)
        if args.quick:
            pairs = pairs.take(np.flatnonzero(np.array(pairs.subsets) == "harmless-base")[:700])
        self.sizes, self.cache = sizes, args.cache_dir
        # One pair a prompt: the two completions of a prompt are all that it has.
        pairs = pairs.take(np.unique(pairs.groups, return_index=True)[1])
        self.options = TrunkOptions(max_length=48 if args.quick else 256, dtype="bfloat16")
        self.proxy = self._part("minilm", pairs)
        self.pairs = pairs
        gold = gold_scores(self._part(args.gold, pairs))
        n = len(pairs)
        self.margin = gold[:n] - gold[n:]  # of the data's first side
        self.noise = noise_of(self.margin)
        self.p = expit(self.margin / self.noise)

    def _part(self, backbone: str, pairs: Preferences) -> Part:
        return Part(
            f"retraining-{backbone}",
            pairs,
            backbone=locate(package_folder(backbone), cache_dir=self.cache),
            options=self.options,
            budget=Budget(0, 0, 0, 0, 0, 0),
            work=self.cache / "retraining",
            cache_dir=self.cache,
        )

    def judged(self, rows: np.ndarray, day: int, rng: np.random.Generator) -> list[Judgment]:
        """Gold's verdicts on pairs, sides at random."""
        found = []
        for i, row in enumerate(rows):
            pair, wins = self.pairs[int(row)], rng.random() < self.p[row]
            turned = rng.random() < 0.5
            sides = (pair.rejected, pair.chosen) if turned else (pair.chosen, pair.rejected)
            found.append(
                Judgment(
                    pair.prompt,
                    *sides,
                    outcome="first" if wins != turned else "second",
                    annotator="gold",
                    judged_at=START + timedelta(days=30 * day, minutes=i),
                    source="benchmark",
                )
            )
        return found

    def margins(self, ensemble: RewardEnsemble, rows: np.ndarray) -> np.ndarray:
        """Reward of the data's first side less the other's, from the features that were read."""
        (scorer,) = ensemble.scorers
        assert isinstance(scorer, HeadScorer)
        n = len(self.pairs)
        sides = self.proxy.read[np.concatenate([rows, n + rows])]
        reward = ensemble.aggregator(ensemble.normaliser(scorer.apply(sides, self.proxy.views)))
        return np.asarray(reward[: len(rows)] - reward[len(rows) :])


def hard(judgments: list[Judgment]) -> Preferences:
    """Return the same as pairs with a chosen side, for training afresh."""
    sides = {"first": lambda j: (j.first, j.second), "second": lambda j: (j.second, j.first)}
    return Preferences(tuple(Preference(j.prompt, *sides[j.outcome](j)) for j in judgments), "old")


class Trial:
    """One seed."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed, s = world, seed, world.sizes
        self.rng = np.random.default_rng(seed)
        order = self.rng.permutation(len(world.pairs))
        ends = np.cumsum([s.fit, s.held, *[s.pool] * s.rounds, s.evaluated])
        self.fit, held, *self.pools, self.evaluated, _ = np.split(order, ends)
        self.old = hard(world.judged(self.fit, 0, self.rng))
        self.reference = self.old[:150]
        first = train(
            *self.old.split(0.85, 0.15, seed=seed),
            backbone=world.proxy.backbone.folder,
            members=5,
            seed=seed,
            options=world.options,
            cache_dir=world.cache,
        )
        first = self.calibrated(first, to_preferences(world.judged(held, 0, self.rng)))
        self.arms = {name: Arm(first) for name in ARMS}
        for arm in self.arms.values():
            self.measure(arm)

    def calibrated(self, ensemble: RewardEnsemble, held: Preferences) -> RewardEnsemble:
        (scorer,) = ensemble.scorers
        assert isinstance(scorer, HeadScorer)
        reading = replace(ensemble, scorers=(scorer.with_cache(FeatureCache(self.world.cache)),))
        try:
            found = reading.calibrate(held, min_judgments=40)
        except CalibrationError as error:
            print(f"not calibrated: {error}", flush=True)
            return ensemble
        return replace(found, scorers=ensemble.scorers)

    def measure(self, arm: Arm) -> None:
        """Best-of-n on the evaluated prompts, and the NLL where the reward is surest."""
        w = self.world
        x, true = w.margins(arm.ensemble, self.evaluated), w.margin[self.evaluated]
        proxy = np.concatenate([x / 2, -x / 2])
        arm.gold.append(best_of(proxy, np.concatenate([true / 2, -true / 2]), w.sizes.n))
        sure = np.argsort(-np.abs(x))[: len(x) // 20]
        calibration = arm.ensemble.calibration
        q = expit(x[sure] / (np.inf if calibration is None else calibration.temperature))
        p = w.p[self.evaluated][sure]
        arm.nll.append(float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()))
        arm.spreads.append(self.spread(arm.ensemble))

    def spread(self, ensemble: RewardEnsemble) -> float:
        """Return the reward's RMS within the reference prompts; of two completions it is |Δ|/√2."""
        x = self.world.margins(ensemble, self.fit[: len(self.reference)])
        return float(np.sqrt((x**2).mean() / 2))

    def winners(self, ensemble: RewardEnsemble, pool: np.ndarray) -> np.ndarray:
        """Prompts of the completions that best-of-n picks, one after another."""
        s, x = self.world.sizes, self.world.margins(ensemble, pool)
        left, found = np.arange(len(pool)), []
        for _ in range(s.asked):
            # Each prompt's candidates are ±Δ/2: of those drawn, one side each, the highest wins.
            drawn = self.rng.choice(left, size=min(s.picked_of, len(left)), replace=False)
            signs = self.rng.choice([-1, 1], len(drawn))
            best = int(drawn[np.argmax(signs * x[drawn])])
            found.append(pool[best])
            left = left[left != best]
        return np.array(found)

    def round(self, number: int) -> None:
        s, pool = self.world.sizes, self.pools[number]
        for name, arm in self.arms.items():
            if name == "frozen":
                self.measure(arm)
                continue
            asked = (
                self.rng.choice(pool, s.asked, replace=False)
                if name == "retrained_random"
                else self.winners(arm.ensemble, pool)
            )
            arm.judgments += self.world.judged(asked, number + 1, self.rng)
            if name == "recalibrated":
                arm.ensemble = self.calibrated(arm.ensemble, to_preferences(arm.judgments))
            else:
                self.retrained(arm, blind=name == "blind")
            self.measure(arm)

    def retrained(self, arm: Arm, *, blind: bool) -> None:
        options = RetrainingOptions(seed=self.seed, min_judgments=30)
        found = retrain(
            arm.ensemble,
            self.old,
            arm.judgments,
            reference=self.reference,
            options=options,
            cache_dir=self.world.cache,
        )
        arm.published.append(found.answer == "publish")
        if found.ensemble is not None:
            arm.ensemble = found.ensemble
        elif blind and found.candidate is not None:
            parts = sufficient_parts(arm.judgments, self.old, options)
            held = Preferences((*parts.calibration, *parts.gate))
            arm.ensemble = self.calibrated(found.candidate, held)


def report(trials: list[Trial], figures: Figures) -> None:
    gold = {arm: np.array([t.arms[arm].gold for t in trials]) for arm in ARMS}
    for arm in ARMS:
        figures.add_repeats(f"gold_{arm}", gold[arm][:, -1].tolist(), over="seeds")
        excess = [t.arms[arm].nll[-1] for t in trials]
        figures.add_repeats(f"nll_{arm}", excess, over="seeds")
    figures.add_repeats("gold_before", gold["frozen"][:, 0].tolist(), over="seeds")
    oracle = []
    for t in trials:
        true = t.world.margin[t.evaluated]
        both = np.concatenate([true / 2, -true / 2])
        oracle.append(best_of(both, both, t.world.sizes.n))
    figures.add_repeats("gold_oracle", oracle, over="seeds")
    for arm in ARMS[1:]:
        gain = gold[arm][:, -1] - gold["frozen"][:, -1]
        figures.add_repeats(f"gain_{arm}", gain.tolist(), over="seeds")
        reach = 2 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
        middle = float(gain.mean())
        figures.add(
            f"mean_gain_{arm}",
            middle,
            middle - reach,
            middle + reach,
            len(gain),
            interval="mean ± 2 standard errors over seeds",
        )
    for arm in ("retrained", "retrained_random"):
        share = [float(np.mean(t.arms[arm].published)) for t in trials]
        figures.add_repeats(f"published_share_{arm}", share, over="seeds")
    spreads = [np.array(t.arms["retrained"].spreads) for t in trials]
    figures.add_repeats(
        "units_error", [float(np.abs(x / x[0] - 1).max()) for x in spreads], over="seeds"
    )


def draw(trials: list[Trial], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for arm in ARMS:
        for axis, what in zip(axes, ("gold", "nll"), strict=True):
            values = np.array([getattr(t.arms[arm], what) for t in trials])
            rounds = np.arange(values.shape[1])
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
            style = "--" if arm == "recalibrated" else "-"
            axis.errorbar(rounds, values.mean(axis=0), error, label=arm, capsize=2, ls=style)
    axes[0].set(xlabel="round", ylabel=f"gold of best-of-{trials[0].world.sizes.n}")
    axes[1].set(xlabel="round", ylabel="NLL above gold's entropy where surest, nats")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="hh_rlhf.jsonl")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--gold", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="gold by round, as PNG")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = Sizes()
    if args.quick:
        sizes = Sizes(120, 60, 210, 200, 90, 1, 8, 32)
        args.seeds, args.gold = 2, "minilm"
    figures = Figures(args)
    world = World(args, sizes)
    print(f"gold's T {world.noise:.3f}", flush=True)
    trials = []
    for seed in range(args.seeds):
        trial = Trial(world, seed)
        for number in range(sizes.rounds):
            trial.round(number)
            said = {arm: round(found.gold[-1], 3) for arm, found in trial.arms.items()}
            print(f"seed {seed} round {number + 1}: {said}", flush=True)
        trials.append(trial)
    report(trials, figures)
    if args.picture is not None:
        draw(trials, args.picture)
    figures.write()


if __name__ == "__main__":
    main()
