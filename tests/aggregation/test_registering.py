"""An aggregator from outside the package: one rule, registered once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.aggregation import (
    Aggregator,
    Coefficient,
    Rule,
    SortedScores,
    make_aggregator,
    mean,
    minimum,
    register,
)
from ensemble_rm.aggregation.rule import RULES
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.members import HeadScorer

MIX = Coefficient("mix", "a number in [0, 1]", lambda value: 0 <= value <= 1)


def mixture(scores: SortedScores, mix: float) -> np.ndarray:
    """Between the mean and the minimum."""
    return (1 - mix) * scores.mean() + mix * scores.lowest()


@pytest.fixture
def registered() -> Iterator[Rule]:
    yield register(Rule("mixture", mixture, (MIX,)))
    del RULES["mixture"]


def test_a_registered_rule_is_an_aggregator_like_the_others(registered: Rule) -> None:
    x = np.random.default_rng(0).normal(size=(20, 4))
    aggregator = make_aggregator("mixture", mix=0.25)
    np.testing.assert_allclose(aggregator(x), 0.75 * mean()(x) + 0.25 * minimum()(x))
    with pytest.raises(OptionError, match=r"mixture: mix must be a number in \[0, 1\], not 2"):
        make_aggregator("mixture", mix=2.0)
    omitting = make_aggregator("mixture", nan="omit", mix=0.25)
    holed = np.column_stack([x, np.full(20, np.nan)])
    np.testing.assert_array_equal(omitting(holed), aggregator(x))
    weights = {"a": 1.0, "b": 3.0, "c": 0.0, "d": 0.0}
    weighted = make_aggregator("mixture", mix=0.25, weights=weights).bind(tuple("abcd"))
    expected = 0.75 * (x[:, :2] @ [0.25, 0.75]) + 0.25 * x[:, :2].min(axis=1)
    np.testing.assert_allclose(weighted(x), expected)
    assert Aggregator.from_json(json.loads(json.dumps(weighted.to_json()))) == weighted
    assert register(registered) is registered  # a second time, as when a module is imported again


def test_an_ensemble_is_saved_with_it_and_loads_once_it_is_registered(
    registered: Rule, two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    aggregator = make_aggregator("mixture", mix=0.5)
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), aggregator)
    folder = ensemble.save_pretrained(tmp_path / "run")
    samples = [Sample("a prompt", "a completion"), Sample("a prompt", "another")]
    loaded = RewardEnsemble.from_pretrained(folder)
    np.testing.assert_array_equal(loaded.score(samples).reward, ensemble.score(samples).reward)
    del RULES["mixture"]
    with pytest.raises(StorageError, match="no aggregator 'mixture'"):
        RewardEnsemble.from_pretrained(folder)
    register(registered)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(OptionError, match="'mean' is registered already"):
        register(Rule("mean", SortedScores.lowest))
    assert mean()([[1.0, 3.0]]) == 2.0


def test_a_formula_that_returns_another_shape_is_refused() -> None:
    register(Rule("broken", lambda scores: scores.values))
    try:
        with pytest.raises(OptionError, match=r"'broken' returned the shape \(2, 3\)"):
            make_aggregator("broken")(np.zeros((2, 3)))
    finally:
        del RULES["broken"]
