"""Wire formats from outside the package, and how formats share a path."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from ensemble_rm import Sample
from ensemble_rm.errors import OptionError
from ensemble_rm.server import RequestContext, Route, WireFormat, register
from ensemble_rm.server.wire import registry
from tests.support.server_process import lengths
from tests.support.server_runs import client


class Chat(BaseModel):
    """A question and its answers."""

    question: str
    answers: list[str]


class Grades(BaseModel):
    """One grade per answer."""

    grades: list[float | None]


async def grade(request: Chat, context: RequestContext) -> Grades:
    """Grade answers."""
    samples = [Sample(request.question, answer) for answer in request.answers]
    scores = await context.score(samples, on_error="record")
    return Grades(
        grades=[None if i in scores.failed else r for i, r in enumerate(scores.reward.tolist())]
    )


async def refuse(request: Chat, context: RequestContext) -> Any:
    """Answer NaN."""
    return {"grades": [float("nan")]}


def route(path: str = "/grade", **options: Any) -> Route:
    return Route(
        **({"path": path, "handler": grade, "request": Chat, "response": Grades} | options)
    )


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))


def test_a_format_from_outside_is_served_and_described() -> None:
    example = {"question": "Hi", "answers": ["Hello", "bad", ""]}
    register(WireFormat("grades", (route(examples={"three answers": example}),)))
    with client(lengths()) as asking:
        answer = asking.post("/grade", json=example)
        assert (answer.status_code, answer.json()) == (200, {"grades": [7.5, None, 0.0]})
        assert answer.headers["x-ensemble-version"]
        wrong = asking.post("/grade", json={"question": "Hi"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (422, "UnprocessableError")
        long = asking.post("/grade", json={"question": "Hi", "answers": ["a"] * 1025})
        assert (long.status_code, long.json()["error"]["type"]) == (413, "TooLargeError")
        assert asking.post("/v1/score", json={"samples": []}).status_code == 422
        description = asking.get("/openapi.json").json()
    operation = description["paths"]["/grade"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert operation["summary"] == "Grade answers."
    assert content["examples"] == {"three answers": {"value": example}}
    assert content["schema"] == {"$ref": "#/components/schemas/Chat"}
    assert "grades" in description["components"]["schemas"]["Grades"]["properties"]


def test_a_format_cannot_answer_with_nan() -> None:
    register(WireFormat("broken", (route(handler=refuse),)))
    with client(lengths()) as asking:
        answer = asking.post("/grade", json={"question": "Hi", "answers": []})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "ValueError")


def test_formats_share_a_path_if_their_requests_differ_by_a_key() -> None:
    register(WireFormat("mine", (route("/classify", keys=("question",), methods=("POST", "PUT")),)))
    with client(lengths()) as asking:
        body = {"question": "Hi", "answers": ["Hello"]}
        assert asking.post("/classify", json=body).json() == {"grades": [7.5]}
        both = asking.post("/classify", json=body | {"input": "Hello"})
        assert both.status_code == 422 and "question" in both.json()["error"]["message"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (WireFormat("vllm", (route(),)), "'vllm' already"),
        (WireFormat("mine", (route("/v1/score"),)), "/v1/score"),
        (
            WireFormat("mine", (route("/classify", keys=("text",), methods=("POST", "PUT")),)),
            "keys",
        ),
        (WireFormat("mine", (route("/classify", keys=("question",)),)), "the same methods"),
        (WireFormat("mine", (route(), route())), "several routes"),
        (WireFormat("mine", (route("grade"),)), "must begin with"),
    ],
)
def test_formats_that_cannot_be_told_apart_are_refused(row: WireFormat, message: str) -> None:
    before = registry.routes_by_path()
    with pytest.raises(OptionError, match=message):
        register(row)
    assert registry.routes_by_path() == before
