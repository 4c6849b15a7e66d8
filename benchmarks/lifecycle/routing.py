"""Gain from routing: accuracy and NLL against the share of pairs sent to a judge.

Real human preferences, hh_rlhf.jsonl. The ensemble is five heads with a view each on a frozen
MiniLM-L6. The judge is a larger model, five such heads on a frozen SmolLM2-135M, calibrated on the
same pairs, and asked as any judge is: over a chat endpoint, in both orders, its log-probabilities
read, with a planted preference of .7 logits for the first side. Both learn from the same pairs;
calibration and test pairs are of other prompts. Features are read once and kept.

Pairs are routed by each uncertainty at each share. The baseline is random routing at the same
share, in expectation: that share of the judge's loss and the rest of the ensemble's.

Figures, a part each (`all` the four subsets together, `harmless` harmless-base alone):
`nll_ensemble`, `nll_judge`, `accuracy_…`; `gain_X_at_S`, NLL of random routing less that of routing
by X at share S, in nats, positive is better, paired by seed (median, lowest, highest over seeds);
`accuracy_gain_X_at_S`, the same of accuracy; `recovered_X_at_S`, the part of the judge's NLL
advantage, over all seeds, that routing has at share S (95 % of a bootstrap over seeds);
`calls_saved_X`, the share of the judge's calls that routing by X saves at the NLL that the judge
has on all pairs, 0 where it never reaches it; `position_bias`, what the judge's preference for a
place comes to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import SHARED_DATA, Figures, make_parser
from benchmarks.shared.preference_runs import Budget, Part, package_folder
from ensemble_rm import (
    FunctionScorer,
    Preferences,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    load_preferences,
)
from ensemble_rm.active_learning import route
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import fit_normaliser
from ensemble_rm.members import HeadRecipe, JudgeComparator
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.heads.training import solve_heads
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.metrics import accuracy, nll

DATA = SHARED_DATA / "hh_rlhf.jsonl"
UNCERTAINTIES = ("epistemic", "total", "aleatoric", "predictive")
SHARES = (0.1, 0.2, 0.3, 0.5)
FRACTIONS = (0.5, 0.1, 0.15, 0.25)  # fit, validation, calibration, test
BIAS = 0.7
PARTS = ("harmless", "all")


class Trunk:
    """A backbone's features of every pair, and the ensembles that are fitted on them."""

    def __init__(self, backbone: str, pairs: Preferences, args: argparse.Namespace) -> None:
        self.part = Part(
            "routing",
            pairs,
            backbone=locate(package_folder(backbone), cache_dir=args.cache_dir),
            options=TrunkOptions(max_length=48 if args.quick else 256, dtype="bfloat16"),
            budget=Budget(0, 0, 0, 0, 0, 0),
            work=args.cache_dir / "routing",
            cache_dir=args.cache_dir,
        )
        self.place = {id(pair): i for i, pair in enumerate(pairs)}

    def ensemble(
        self, fit: np.ndarray, validation: np.ndarray, calibration: np.ndarray, seed: int
    ) -> RewardEnsemble:
        k = len(self.part.views)
        heads = solve_heads(
            self.part.take(fit),
            self.part.take(validation),
            view_of=list(range(k)),
            recipe=HeadRecipe(),
            seeds=member_seeds(seed, k),
        ).weights
        samples, n = self.part.pairs.samples(), len(self.part.pairs)
        scores = np.stack([heads(i, self.part.read[:, i]) for i in range(k)], axis=1)
        table = dict(zip(map(_key, samples), scores, strict=True))

        def member(i: int) -> FunctionScorer:
            return FunctionScorer(f"view {i}", lambda sample: float(table[_key(sample)][i]))

        both = np.concatenate([validation, n + validation])
        groups = np.tile(self.part.pairs.groups[validation], 2)
        normaliser = fit_normaliser(scores[both], groups)
        plain = RewardEnsemble(tuple(member(i) for i in range(k)), normaliser, mean())
        held = self.part.pairs.take(calibration).shuffled_sides(seed=seed)
        return plain.calibrate(held)


def _key(sample: Sample) -> tuple[object, str]:
    return sample.prompt, sample.completion


def judge_of(ensemble: RewardEnsemble, pairs: Preferences) -> JudgeComparator:
    """Serve an ensemble's comparisons as a chat judge's."""
    found = ensemble.compare(
        [p.prompt for p in pairs], [p.chosen for p in pairs], [p.rejected for p in pairs]
    )
    margins = {}
    rubric = "pairwise"
    judge = JudgeComparator("http://judge.invalid/v1", model="judge", rubric=rubric)
    for pair, p in zip(pairs, found.probability, strict=True):
        for first, second, sign in (
            (pair.chosen, pair.rejected, 1.0),
            (pair.rejected, pair.chosen, -1.0),
        ):
            question = judge.rubric.ask(pair.prompt, first=first, second=second)
            margins[question[1]["content"]] = sign * float(logit(p))

    def handle(request: httpx.Request) -> httpx.Response:
        margin = margins[json.loads(request.content)["messages"][1]["content"]] + BIAS
        options = {"A": float(expit(margin)), "B": float(expit(-margin))}
        top = [{"token": t, "logprob": math.log(max(p, 1e-12))} for t, p in options.items()]
        top.sort(key=lambda one: -float(one["logprob"]))
        choice = {"message": {"content": top[0]["token"]}}
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        return httpx.Response(200, json={"choices": [choice]})

    return JudgeComparator(
        "http://judge.invalid/v1",
        model="judge",
        rubric=rubric,
        transport=httpx.MockTransport(handle),
    )


@dataclass(frozen=True)
class Remembered:
    """A judge's verdicts, asked for once: the sweep over shares asks for them again and again."""

    found: dict[tuple[object, str, str], float]
    probability: np.ndarray = field(default_factory=lambda: np.empty(0))

    def compare(self, prompts: Any, first: Any, second: Any) -> Remembered:
        p = [self.found[key] for key in zip(prompts, first, second, strict=True)]
        return replace(self, probability=np.array(p))


def trial(cheap: Trunk, strong: Trunk, seed: int) -> dict[str, float]:
    """Deal the pairs, fit both, and route."""
    pairs = cheap.part.pairs
    parts = pairs.split(*FRACTIONS, seed=seed)
    rows = [np.array([cheap.place[id(p)] for p in part]) for part in parts]
    ensemble = cheap.ensemble(*rows[:3], seed)
    test = parts[3].shuffled_sides(seed=seed)
    judge = judge_of(strong.ensemble(*rows[:3], seed), test)
    y = test.targets
    whole = route(ensemble, test, share=1.0, judge=judge)
    ours, theirs = whole.comparison.probability, whole.judge_probability
    prompts = [pair.prompt for pair in test]
    sides = ([pair.chosen for pair in test], [pair.rejected for pair in test])
    orders = judge.compare(prompts, *sides)
    again = Remembered(dict(zip(zip(prompts, *sides, strict=True), theirs.tolist(), strict=True)))
    found = {"position_bias": orders.position_bias}
    for name, p in (("ensemble", ours), ("judge", theirs)):
        found |= {f"nll_{name}": nll(p, y), f"accuracy_{name}": accuracy(p, y)}
    for uncertainty in UNCERTAINTIES:
        saved = 0.0
        for share in np.round(np.arange(0.95, 0.0, -0.05), 2):
            p = route(ensemble, test, share=share, judge=again, uncertainty=uncertainty).probability
            if nll(p, y) <= nll(theirs, y):
                saved = 1.0 - share
        found[f"calls_saved_{uncertainty}"] = saved
        for share in SHARES:
            routed = route(ensemble, test, share=share, judge=again, uncertainty=uncertainty)
            p, at = routed.probability, f"{uncertainty}_at_{round(100 * share)}"
            asked = routed.saving.share
            for measure, sign in ((nll, 1.0), (accuracy, -1.0)):
                random = asked * measure(theirs, y) + (1 - asked) * measure(ours, y)
                name = "gain" if measure is nll else "accuracy_gain"
                found[f"{name}_{at}"] = sign * (random - measure(p, y))
            found[f"won_{at}"] = nll(ours, y) - nll(p, y)
    return found


def report(name: str, results: list[dict[str, float]], figures: Figures) -> None:
    table = {key: np.array([one[key] for one in results]) for key in results[0]}
    advantage = table["nll_ensemble"] - table["nll_judge"]
    draws = np.random.default_rng(0).integers(len(results), size=(1000, len(results)))
    for key, values in table.items():
        if not key.startswith("won_"):
            figures.add_repeats(f"{key}_{name}", values.tolist(), over="seeds")
        elif advantage.mean() > 1e-6:  # of all seeds together: a single one may have none
            own = values[draws].sum(axis=1) / advantage[draws].sum(axis=1)
            share = values.sum() / advantage.sum()
            low, high = np.quantile(own, [0.025, 0.975])
            figures.add(
                f"recovered_{key[4:]}_{name}",
                share,
                low,
                high,
                len(results),
                interval="95 % bootstrap over seeds",
            )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="hh_rlhf.jsonl")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--parts", nargs="+", choices=["harmless", "all"], default=["harmless", "all"]
    )
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    figures = Figures(args)
    everything = load_preferences(args.data)
    harmless = np.flatnonzero(np.array(everything.subsets) == "harmless-base")
    for name in ["harmless"] if args.quick else args.parts:
        pairs = everything
        if name == "harmless":
            pairs = everything.take(harmless[:420] if args.quick else harmless)
        strong = "minilm" if args.quick else "smollm2"
        cheap, other = Trunk("minilm", pairs, args), Trunk(strong, pairs, args)
        results = []
        for seed in range(2 if args.quick else args.seeds):
            results.append(trial(cheap, other, seed))
            print(f"{name} seed {seed}: " + json.dumps(results[-1])[:300], flush=True)
        report(name, results, figures)
    figures.write()


if __name__ == "__main__":
    main()
