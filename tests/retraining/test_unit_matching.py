"""The pressure on a policy: a candidate's reward is spread as the incumbent's was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble, Sample
from ensemble_rm.aggregation import Aggregator, cvar, entropic, lcb, mean, median, minimum, uwo
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.errors import DataError
from ensemble_rm.retraining import same_units

AGGREGATORS = [
    mean(),
    minimum(),
    median(),
    lcb(kappa=1.5),
    uwo(lam=0.5),
    entropic(beta=0.3),
    cvar(alpha=0.5),
]


class Table:
    """Members whose scores are looked up by the completion's number."""

    def __init__(self, scores: np.ndarray[Any, Any]) -> None:
        self.names = tuple(f"member{i}" for i in range(scores.shape[1]))
        self._scores = scores

    def score(self, samples: list[Sample]) -> np.ndarray[Any, Any]:
        return self._scores[[int(sample.completion) for sample in samples]]


def reference(n: int = 80, prompts: int = 25) -> Preferences:
    rng = np.random.default_rng(5)
    return Preferences(
        tuple(
            Preference(f"prompt {g}", str(2 * i), str(2 * i + 1))
            for i, g in enumerate(rng.integers(0, prompts, n))
        )
    )


def ensemble_of(
    scores: np.ndarray[Any, Any], aggregator: Aggregator, *, fitted: bool = True
) -> RewardEnsemble:
    pairs = reference()
    scorer = Table(scores)
    raw = scorer.score(pairs.samples())
    normaliser = fit_normaliser(raw, pairs.sample_groups())
    k = scores.shape[1]
    return RewardEnsemble(
        (scorer,),
        normaliser if fitted else Normaliser((3.0,) * k, (0.2,) * k),
        aggregator,
    )


def made(correlation: float, *, k: int = 4, seed: int = 0) -> np.ndarray[Any, Any]:
    """Scores of 160 completions whose members agree more or less, in units of their own."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(160, 1)), rng.normal(size=(160, k))
    scores = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return scores * rng.uniform(0.1, 40, k) + rng.normal(0, 100, k)


def rms_and_mean(ensemble: RewardEnsemble) -> tuple[float, float]:
    """The spread within prompts, written out."""
    pairs = reference()
    reward, groups = ensemble.score(pairs.samples()).reward, pairs.sample_groups()
    squares, freedom = 0.0, 0
    for group in np.unique(groups):
        some = reward[groups == group]
        squares += float(((some - some.mean()) ** 2).sum())
        freedom += len(some) - 1
    return float(np.sqrt(squares / freedom)), float(reward.mean())


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
@pytest.mark.parametrize("correlation", [0.2, 0.95])
@pytest.mark.parametrize("fitted", [True, False])
def test_spread_and_level_stay(aggregator: Aggregator, correlation: float, fitted: bool) -> None:
    incumbent = ensemble_of(made(0.7, seed=1), aggregator)
    candidate = ensemble_of(made(correlation, k=5, seed=2), mean(), fitted=fitted)
    found = same_units(candidate, incumbent, reference())
    assert found.aggregator == aggregator and found.calibration is None
    np.testing.assert_allclose(rms_and_mean(found), rms_and_mean(incumbent), rtol=1e-9, atol=1e-9)
    # Every member has one spread: none outweighs the others.
    scores = found.score(reference().samples()).members
    scales = fit_normaliser(scores, reference().sample_groups()).scale
    np.testing.assert_allclose(scales, scales[0], rtol=1e-9)


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
def test_the_same_members_in_other_units_are_the_same_ensemble(aggregator: Aggregator) -> None:
    scores = made(0.6, seed=3)
    incumbent = ensemble_of(scores, aggregator)
    candidate = ensemble_of(scores * [2.0, 0.1, 7.0, 1.0] + [1.0, -3.0, 0.0, 50.0], mean())
    found = same_units(candidate, incumbent, reference())
    samples = [Sample("prompt", str(i)) for i in range(160)]
    np.testing.assert_allclose(
        found.score(samples).reward, incumbent.score(samples).reward, rtol=1e-8, atol=1e-8
    )


def test_twice_is_once() -> None:
    incumbent = ensemble_of(made(0.7), uwo(lam=0.5))
    once = same_units(ensemble_of(made(0.3, seed=4), mean()), incumbent, reference())
    twice = same_units(once, incumbent, reference())
    np.testing.assert_allclose(twice.normaliser.scale, once.normaliser.scale, rtol=1e-9)
    np.testing.assert_allclose(twice.normaliser.offset, once.normaliser.offset, rtol=1e-9)


def test_no_reference_is_refused() -> None:
    rule = RewardEnsemble(
        (FunctionScorer("length", lambda s: float(len(s.completion))),),
        Normaliser.identity(1),
        mean(),
    )
    with pytest.raises(DataError):
        same_units(rule, rule, Preferences(()))
