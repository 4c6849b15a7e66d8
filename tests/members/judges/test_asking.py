"""What a judge is asked, and asked again; what is counted of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ensemble_rm.members import ClientOptions, JudgeComparator, Price
from tests.support.judge_doubles import completion, judge

N = 12
PROMPTS = [f"question {i}" for i in range(N)]
FIRST = [f"an answer {i}" for i in range(N)]
SECOND = [f"another answer {i}" for i in range(N)]


def comparator(transport: Any, **options: Any) -> JudgeComparator:
    return JudgeComparator("http://judge.test/v1", model="judge", transport=transport, **options)


def test_a_rejected_question_that_names_logprobs_leaves_them_on() -> None:
    """As FastAPI's own 422, which quotes the request, and an error that quotes the sample."""
    inner = judge()

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if "BAD" in body["messages"][-1]["content"]:
            said = {"detail": [{"msg": "too long", "input": body | {"messages": "logprobs?"}}]}
            return httpx.Response(422, json=said)
        return inner.handler(request)  # type: ignore[return-value]

    judged = comparator(httpx.MockTransport(handle))
    assert "422" in str(judged.compare(["BAD"], ["a"], ["b"]).errors[0])
    assert judged.compare(PROMPTS, FIRST, SECOND).sources == ("logprobs",) * N


def test_a_refusal_of_logprobs_is_found_wherever_it_stands() -> None:
    inner = judge(offers="nothing")

    def handle(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("logprobs"):
            message = "The request could not be validated. " * 20 + "Unsupported: logprobs"
            return httpx.Response(400, json={"error": {"message": message}})
        return inner.handler(request)  # type: ignore[return-value]

    found = comparator(httpx.MockTransport(handle)).compare(PROMPTS, FIRST, SECOND)
    assert not found.errors and set(found.sources) == {"words"}


def test_what_was_not_asked_is_not_counted_and_what_was_answered_is() -> None:
    """A server that goes away: who finds it away takes nothing, nor does who comes after."""
    left = 5

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal left
        left -= 1
        if left < 0:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json=completion("A", None))

    quick = ClientOptions(deadline=1.0, backoff=0.01, reset_after=0.01, concurrency=1)
    judged = comparator(httpx.MockTransport(handle), client=quick, price=Price(1.0, 1.0))
    found = judged.compare(PROMPTS, FIRST, SECOND).usage
    assert (found.calls, found.failed, found.unreached) == (5, 0, 2 * N - 5)
    assert found.prompt_tokens == 5 * 100 and found.cost == pytest.approx(5 * 101 / 1e6)


@pytest.mark.parametrize("choices", [[], None, [completion("A", None)["choices"][0]] * 2])
def test_an_answer_without_a_single_choice_is_paid_for(choices: Any) -> None:
    answer = completion("A", None) | {"choices": choices}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    found = comparator(transport, price=Price(1.0, 1.0)).compare(PROMPTS, FIRST, SECOND)
    assert "exactly one choice" in str(found.errors[0])
    assert (found.usage.calls, found.usage.failed) == (0, 2 * N)
    assert found.usage.prompt_tokens == 2 * N * 100
    assert found.usage.cost == pytest.approx(2 * N * 101 / 1e6)
