"""What a member's server says of a sample, which may quote it, reaches no log of this server."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample, Scorer
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members import ClientOptions, JudgeScorer
from ensemble_rm.members.remote.server_scorer import failure_kind
from tests.support.judge_doubles import completion
from tests.support.remote_members import member
from tests.support.server_runs import client, one

MARK = "zebra-crossing"
PATIENT = ClientOptions(backoff=1e-4, open_after=1000)
Answer = Callable[[str], httpx.Response]


def quoting(answer: Answer) -> httpx.MockTransport:
    """A server that answers with what it was sent."""
    return httpx.MockTransport(lambda request: answer(request.content.decode()))


def judge(answer: Answer) -> JudgeScorer:
    transport = quoting(answer)
    return JudgeScorer("http://j/v1", model="m", name="far", client=PATIENT, transport=transport)


def remote(answer: Answer) -> Scorer:
    return member(quoting(answer), batch_size=4, client=PATIENT)


def of_text(text: str) -> str:
    """The part of a request that its client wrote."""
    return text[text.index(MARK) :][:60]


FAULTS: list[tuple[Callable[[Answer], Any], Answer]] = [
    (judge, lambda text: httpx.Response(200, json=completion(of_text(text), None))),
    (judge, lambda text: httpx.Response(422, text=of_text(text))),
    (judge, lambda text: httpx.Response(200, json={"choices": of_text(text)})),
    (judge, lambda text: httpx.Response(200, text=of_text(text))),
    (remote, lambda text: httpx.Response(422, text=of_text(text))),
    (remote, lambda text: httpx.Response(500, text=of_text(text))),
    (remote, lambda text: httpx.Response(200, text=of_text(text))),
    (remote, lambda text: httpx.Response(200, json={of_text(text): 1})),
    (remote, lambda text: httpx.Response(200, json={"rewards": [of_text(text)]})),
]


@pytest.mark.parametrize(("make", "answer"), FAULTS)
def test_no_warning_quotes_a_request_nor_grows_with_them(
    make: Callable[[Answer], Any], answer: Answer, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer = make(answer)
    near = FunctionScorer("near", lambda sample: 1.0)
    omit = make_aggregator("mean", nan="omit")
    ensemble = RewardEnsemble((near, scorer), Normaliser.identity(2), omit)

    def figure() -> float:
        lines = asking.get("/metrics").text.splitlines()
        name = 'ensemble_rm_missing_member_scores_total{member="far"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with client(lambda: warmed(ensemble)) as asking:
            for i in range(20):
                said = asking.post("/v1/score", json=one(f"{MARK} {i}, and my password is {i}"))
                assert said.json()["rewards"] == [1.0]
            assert figure() == 20
    # What earlier tests left open warns whenever it is collected: that is none of this server's.
    ours = [one for one in seen if not issubclass(one.category, ResourceWarning)]
    texts = {str(warning.message) for warning in ours}
    assert all(MARK not in text and "password" not in text for text in texts)
    assert len(texts) == 1
    assert MARK not in "".join(capfd.readouterr())
    scorer.close()


def warmed(ensemble: RewardEnsemble) -> RewardEnsemble:
    """The same ensemble, whose judges and members are asked about marked texts alone."""
    far = ensemble.scorers[1]

    class Marked:
        names = far.names

        def score(self, samples: Any) -> Any:
            marked = [s for s in samples if MARK in s.completion]
            scores = np.full((len(samples), 1), np.nan)
            return far.score(marked) if marked else scores

    return RewardEnsemble((ensemble.scorers[0], Marked()), ensemble.normaliser, ensemble.aggregator)


def test_the_whole_reason_is_there_for_whom_asks() -> None:
    scorer = member(quoting(lambda text: httpx.Response(422, text=of_text(text))))
    error = scorer.score_detailed([Sample("q", MARK)]).errors[0]
    assert str(error).startswith("status 422: ") and MARK in str(error)
    for again in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (str(again), failure_kind(again, "")) == (str(error), "status 422")
    scorer.close()
