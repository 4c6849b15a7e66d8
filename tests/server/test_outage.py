"""A server whose members live elsewhere and are out of reach: one wait, and a 503 for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import (
    NonFiniteScoreError,
    RemoteActivationError,
    RemoteError,
    RemoteRefusalError,
    RemoteUnavailableError,
)
from ensemble_rm.rl.scoring import score_each
from tests.support.server_runs import client, one


class Elsewhere:
    """Lives on a server that goes away at its n-th call; a completion "bad" has no score."""

    names = ("far",)

    def __init__(self, error: RemoteError, *, after: int = 0) -> None:
        self.error, self.after, self.calls = error, after, 0

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        scores = [np.nan if s.completion == "bad" else len(s.completion) for s in samples]
        return np.array(scores, dtype=np.float64)[:, None]


def ensemble(scorer: Elsewhere) -> RewardEnsemble:
    return RewardEnsemble((scorer,), Normaliser.identity(1), mean())


errors = st.sampled_from(
    [RemoteUnavailableError("gone"), RemoteRefusalError("no"), RemoteActivationError("soft")]
)
texts = st.lists(st.sampled_from(["a", "bb", "bad"]), max_size=12)


@given(texts, errors, st.integers(0, 12))
def test_nobody_is_asked_again_after_an_outage(
    completions: list[str], error: RemoteError, after: int
) -> None:
    """What was scored before it keeps its score, and all the rest has the outage's error."""
    scorer = Elsewhere(error, after=after)
    scores = ensemble(scorer).score([Sample("q", text) for text in completions], on_error="record")
    assert scorer.calls <= after + 1
    assert len(scores) == len(completions)
    lost = [scores.failed.get(row) is error for row in range(len(completions))]
    assert lost == sorted(lost)  # the batch is read from its beginning
    assert any(lost) == (scorer.calls > after)
    for row, text in enumerate(completions):
        if row not in scores.failed:
            assert scores.reward[row] == len(text)
            continue
        failure = scores.failed[row]
        assert failure is error or (text == "bad" and type(failure) is NonFiniteScoreError)
        assert np.isnan(scores.reward[row]) and np.isnan(scores.members[row]).all()


@given(texts.filter(bool), errors)
def test_an_outage_fails_every_sample(completions: list[str], error: RemoteError) -> None:
    samples = [Sample("q", text) for text in completions]
    scores = ensemble(Elsewhere(error)).score(samples, on_error="record")
    assert np.isnan(scores.reward).all()
    assert scores.failed == dict.fromkeys(range(len(samples)), error)


def test_a_loop_ends_with_the_outage_itself() -> None:
    scorer = Elsewhere(RemoteUnavailableError("gone"))
    with pytest.raises(RemoteUnavailableError):
        score_each(ensemble(scorer), [Sample("q", "a")] * 8)
    assert scorer.calls == 1


def test_a_request_of_several_samples_is_a_503_after_one_wait() -> None:
    scorer = Elsewhere(RemoteUnavailableError("gone"), after=1)  # the warm-up
    with client(ensemble(scorer)) as asking:
        answer = asking.post("/v1/score", json={"samples": one("a")["samples"] * 8})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "RemoteUnavailableError")
    assert scorer.calls == 2
