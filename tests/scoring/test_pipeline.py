"""One pass over all members: failing samples fail alone, and each row without a reward says why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample, Scorer
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.calibration import Normaliser
from ensemble_rm.data.samples import Preference, Preferences
from ensemble_rm.errors import (
    BaselineError,
    NonFiniteScoreError,
    OptionError,
    RemoteUnavailableError,
    StorageError,
)
from ensemble_rm.members import MemberScores
from ensemble_rm.members.scorer import AdaptedScorer, Truncation
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import score_members
from ensemble_rm.uncertainty.distance import fit_feature_space


class Counting(Scorer):
    """Scores a completion's number, and counts its passes; some numbers fail it."""

    names = ("counting",)

    def __init__(self, bad: Sequence[int] = (), error: type[BaseException] = ValueError) -> None:
        self.bad, self.error, self.passes = frozenset(bad), error, 0

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        self.passes += 1
        values = [int(sample.completion) for sample in samples]
        if self.bad & set(values):
            raise self.error(f"{self.bad & set(values)}")
        return np.array(values, dtype=np.float64).reshape(-1, 1)


class Inputs(Counting):
    """The same, with features."""

    def features(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        self.score(samples)
        return np.array([[len(s.completion), int(s.completion)] for s in samples], dtype=float)


def samples(n: int) -> list[Sample]:
    return [Sample("", str(i)) for i in range(n)]


def ensemble(*scorers: Scorer, nan: str = "raise", baseline: bool = False) -> RewardEnsemble:
    k = len(scorers)
    normaliser = Normaliser((0.0,) * k, (1.0,) * k, baseline)
    return RewardEnsemble(scorers, normaliser, make_aggregator("mean", nan=nan))  # type: ignore[arg-type]


@given(st.integers(1, 300), st.data())
def test_one_bad_sample_costs_no_other_its_score(n: int, data: st.DataObject) -> None:
    """At most 2·log₂(n) more passes, and only of the member that failed."""
    bad = data.draw(st.integers(0, n - 1))
    failing, other = Counting([bad]), FunctionScorer("other", lambda _: 1.0)
    well = Counting()
    well.names = ("well",)
    scores = ensemble(failing, other, well).score(samples(n), on_error="record")
    assert list(scores.failed) == [bad]
    assert scores.errors == {(bad, "counting"): scores.failed[bad]}
    assert isinstance(scores.failed[bad], ValueError)
    assert failing.passes - 1 <= 2 * math.ceil(math.log2(n)) if n > 1 else failing.passes == 1
    assert well.passes == 1
    good = np.array([i for i in range(n) if i != bad], dtype=int)
    expected = ensemble(Counting(), other, well).score(samples(n))
    np.testing.assert_array_equal(scores.reward[good], expected.reward[good])
    np.testing.assert_array_equal(scores.raw[good], expected.raw[good])
    assert np.isnan(scores.reward[bad]) and np.isnan(scores.raw[bad]).all()


@given(st.sets(st.integers(0, 19)), st.lists(st.integers(0, 19), max_size=30))
def test_every_row_without_a_reward_says_why(bad: set[int], rows: list[int]) -> None:
    """Whatever fails: a member, an aggregation, or both; equal samples fail alike."""
    holes = FunctionScorer("holes", lambda s: math.nan if int(s.completion) % 3 == 0 else 1.0)
    asked = [Sample("", str(i)) for i in rows]
    for nan in ("raise", "omit"):
        scores = ensemble(Counting(bad), holes, nan=nan).score(asked, on_error="record")
        lost = {i for i, row in enumerate(rows) if row in bad or (nan == "raise" and row % 3 == 0)}
        assert set(scores.failed) == lost == set(np.flatnonzero(np.isnan(scores.reward)))
        for i in lost:
            kind = ValueError if rows[i] in bad else NonFiniteScoreError
            assert isinstance(scores.failed[i], kind)
            assert np.isnan([*scores.members[i], *scores.raw[i]]).all()


def test_the_first_error_passes_through_by_default() -> None:
    failing = Counting([3])
    with pytest.raises(ValueError, match="3"):
        ensemble(failing).score(samples(8))
    assert failing.passes == 1
    with pytest.raises(OptionError, match="'ignore'"):
        ensemble(failing).score(samples(8), on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_never_recorded(error: type[BaseException]) -> None:
    failing = Counting([3], error)
    with pytest.raises(error):
        ensemble(failing).score(samples(8), on_error="record")
    assert failing.passes == 1


class Panic(BaseException):
    """As a panic in Rust is raised."""


def test_a_panic_fails_its_sample_alone() -> None:
    scores = ensemble(Counting([3], Panic)).score(samples(8), on_error="record")
    assert list(scores.failed) == [3]
    assert isinstance(scores.failed[3].__cause__, Panic)


def test_an_outage_is_not_halved() -> None:
    away = Counting([3], RemoteUnavailableError)
    scores = ensemble(away).score(samples(8), on_error="record")
    assert away.passes == 1 and sorted(scores.failed) == list(range(8))


def test_an_infinite_score_fails_its_sample_alone() -> None:
    member = FunctionScorer("m", lambda s: math.inf if s.completion == "2" else 1.0)
    scores = ensemble(member).score(samples(4), on_error="record")
    assert list(scores.failed) == [2] and isinstance(scores.failed[2], NonFiniteScoreError)


def test_a_sample_fails_with_its_reference_and_one_without_alone() -> None:
    asked = [Sample("p", "5", "1"), Sample("p", "6", "3"), Sample("p", "7"), Sample("q", "8", "1")]
    scores = ensemble(Counting([3]), baseline=True).score(asked, on_error="record")
    np.testing.assert_array_equal(scores.reward, [4.0, np.nan, np.nan, 7.0])
    assert isinstance(scores.failed[1], ValueError)
    assert isinstance(scores.failed[2], BaselineError) and "row 2" in str(scores.failed[2])


def test_distances_come_of_the_same_call_and_are_nan_where_a_sample_failed() -> None:
    rng = np.random.default_rng(0)
    space = fit_feature_space(rng.normal(3, 1, (200, 2)))
    result = score_members([Inputs([2])], samples(5), space=space, on_error="record")
    whole = score_members([Inputs()], samples(5), space=space)
    assert result.distance is not None and whole.distance is not None
    assert (
        np.isnan(result.distance[2])
        and result.failed.tolist() == [False, False, True] + [False] * 2
    )
    good = [0, 1, 3, 4]
    np.testing.assert_array_equal(result.distance[good], whole.distance[good])


def test_a_member_on_a_server_says_why_it_has_no_score() -> None:
    """Under nan="omit" the row has a reward all the same."""

    class Elsewhere(Scorer):
        names = ("far",)

        def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
            return self.score_detailed(samples).scores

        def score_detailed(self, samples: Sequence[Sample], **_: object) -> MemberScores:
            scores = np.array([[np.nan if s.completion == "1" else 1.0] for s in samples])
            return MemberScores(
                scores, Truncation.none(len(samples)), errors={1: ValueError("too long")}
            )

    near = FunctionScorer("near", lambda _: 2.0)
    for on_error in ("raise", "record"):
        scores = ensemble(near, Elsewhere(), nan="omit").score(samples(3), on_error=on_error)  # type: ignore[arg-type]
        assert scores.reward.tolist() == [1.5, 2.0, 1.5] and not scores.failed
        assert str(scores.errors[1, "far"]) == "too long"


# The interface -----------------------------------------------------------------------------------


class Plain:
    """A user's own class, no subclass of anything."""

    names = ("plain",)

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        return np.array([[float(len(s.completion))] for s in samples])


def test_names_and_score_alone_make_a_member(tmp_path: object) -> None:
    whole = RewardEnsemble((Plain(),), Normaliser.identity(1), make_aggregator("mean"))  # type: ignore[arg-type]
    (scorer,) = whole.scorers
    assert isinstance(scorer, AdaptedScorer) and isinstance(scorer.member, Plain)
    assert whole.score(samples(12)).reward.tolist() == [1.0] * 10 + [2.0] * 2
    assert whole.names == ("plain",)
    with pytest.raises(OptionError, match="str lacks"):
        RewardEnsemble(("plain",), Normaliser.identity(1), make_aggregator("mean"))  # type: ignore[arg-type]


def test_the_defaults_say_that_there_is_no_such_thing(tmp_path: object) -> None:
    member = Counting()
    assert member.digest is None and member.options is None and member.begin([]) is None
    assert member.features(samples(1)) is None and member.unloaded() is member
    assert member.address is None and member.token is None
    detailed = member.score_detailed(samples(2), features=True)
    assert detailed.features is None and detailed.truncation.samples == 2
    member.unload()
    for refused, error in (
        (lambda: member.save(tmp_path), StorageError),  # type: ignore[arg-type]
        (member.describe, StorageError),
        (lambda: member.with_token("t"), OptionError),
        (lambda: member.with_options(None), OptionError),  # type: ignore[arg-type]
        (lambda: member.with_names(["a", "b"]), OptionError),
    ):
        with pytest.raises(error, match="'counting'"):
            refused()
    assert member.with_names(["other"]).names == ("other",) and member.names == ("counting",)


def test_a_pool_changes_nothing_in_what_is_recorded() -> None:
    pooled = score_members([Counting([2])], samples(5), pool=ModelPool(1), on_error="record")
    assert pooled.failed.tolist() == [False, False, True, False, False]


def test_judging_keeps_a_missing_score_whatever_the_policy() -> None:
    holes = FunctionScorer("holes", lambda s: math.nan if s.completion == "1" else 1.0)
    scored = ensemble(holes).judge(Preferences((Preference("p", "1", "2"),)))
    assert np.isnan(scored.first).all() and scored.second.tolist() == [[1.0]]
