"""What a client's own mistake costs: a 4xx that says so, and neither an alarm nor the others' time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from server_process import length, lengths
from server_runs import client, one

from ensemble_rm import FunctionScorer, Normaliser, RewardEnsemble, mean


def alone() -> RewardEnsemble:
    return RewardEnsemble((FunctionScorer("length", length),), Normaliser.identity(1), mean())


# An aggregator that the ensemble cannot be asked for ---------------------------------------------

IMPOSSIBLE = [
    ({"name": "lcb", "kappa": 1}, alone(), "OneMemberError"),
    ({"name": "uwo", "lam": 0.5}, alone(), "OneMemberError"),
    ({"name": "uwo", "lam": 1e308}, lengths(), "NonFiniteScoreError"),  # it overflows
]


@pytest.mark.parametrize(("aggregator", "ensemble", "name"), IMPOSSIBLE)
def test_an_aggregator_that_cannot_be_asked_for_is_the_requests_fault(
    aggregator: dict[str, Any],
    ensemble: RewardEnsemble,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = one("Hello") | {"aggregator": aggregator}
    with client(ensemble) as asking, caplog.at_level(logging.INFO, "ensemble_rm.server.http"):
        answer = asking.post("/v1/score", json=body)
        assert answer.status_code == 422 and name in answer.json()["error"]["message"]
        partial = asking.post("/v1/score", json=body | {"partial": True}).json()
        assert (partial["rewards"], partial["errors"]) == ([None], [name])
    assert not [r for r in caplog.records if r.name == "ensemble_rm.server.http"]


def test_an_aggregator_of_the_ensembles_own_is_not() -> None:
    """A sample without a score fails by its own error, whatever aggregator was asked for."""
    body = one("bad") | {"aggregator": {"name": "minimum"}}
    with client(alone()) as asking:
        answer = asking.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "NonFiniteScoreError")
