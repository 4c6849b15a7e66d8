"""The routes' table and their OpenAPI description, with examples.

Bodies are read within limits before they are parsed (`http.py`), so that FastAPI is told their
schemas here. Knows FastAPI and the wire formats' models; knows nothing of scoring.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from ensemble_rm.server.http.bodies import VERSION_HEADER
from ensemble_rm.server.http.guard import OPEN
from ensemble_rm.server.wire import llamafactory, native, openrlhf, sglang, vllm

if TYPE_CHECKING:
    from ensemble_rm.server.http.routes import Routes

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
_REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    """What went wrong; never the request's text."""

    message: str
    type: str
    param: None = None
    code: int


class ErrorAnswer(BaseModel):
    """A refusal, or a failure with its name: it never looks like a reward."""

    error: ErrorDetail


_CHATML = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
_TEXT = f"{_CHATML}Fine, thank you.<|im_end|>"
_TURNS = [{"role": "user", "content": "How are you?"}]
_REFUSALS = {
    400: "No JSON.",
    401: "No token, or a wrong one.",
    408: "The body came too slowly.",
    409: "No calibration of this aggregator.",
    413: "Over a limit.",
    415: "Not declared as JSON, or declared as compressed.",
    422: "JSON of another shape, or what cannot be scored.",
    429: "As much waits as may: come again after Retry-After seconds.",
    500: "Scoring failed, by this name.",
    502: "A member's server refuses, or answers what cannot be read.",
    503: "Not loaded yet, shutting down, or a member's server is out of reach.",
}


@dataclass(frozen=True)
class _Post:
    path: str
    handler: str
    bodies: tuple[type[BaseModel], ...]
    answers: tuple[type[BaseModel], ...]
    examples: dict[str, Any]
    listed: bool = False  # the answer is one object or a list of them
    methods: tuple[str, ...] = ("POST",)


_POSTS = (
    _Post(
        "/v1/score",
        "score",
        (native.ScoreRequest,),
        (native.ScoreAnswer,),
        {
            "text": {"samples": [{"prompt": "How are you?", "completion": "Fine, thank you."}]},
            "messages": {
                "samples": [{"prompt": _TURNS, "completion": "Fine, thank you."}],
                "aggregator": {"name": "lcb", "kappa": 1.0},
            },
        },
    ),
    _Post(
        "/v1/compare",
        "compare",
        (native.CompareRequest,),
        (native.CompareAnswer,),
        {"pair": {"pairs": [{"prompt": _TURNS, "first": "Fine, thank you.", "second": "So so."}]}},
    ),
    _Post(
        "/get_reward",
        "get_reward",
        (openrlhf.OpenRLHFRequest,),
        (openrlhf.OpenRLHFAnswer,),
        {
            "messages in the label": {
                "query": [_TEXT],
                "prompts": [_CHATML],
                "labels": ['[{"role": "user", "content": "How are you?"}]'],
            }
        },
    ),
    _Post(
        "/classify",
        "classify",
        (vllm.ClassifyText, vllm.ClassifyChat, sglang.SGLangText),
        (vllm.ClassifyAnswer, sglang.SGLangScore),
        {
            "vLLM, text": {"input": [_TEXT], "use_activation": False},
            "vLLM, messages": {
                "messages": [*_TURNS, {"role": "assistant", "content": "Fine."}],
                "use_activation": False,
            },
            "SGLang": {"text": _TEXT},
        },
        listed=True,
        methods=("POST", "PUT"),
    ),
    _Post(
        "/v1/embeddings",
        "embeddings",
        (sglang.EmbeddingsRequest,),
        (sglang.EmbeddingsAnswer,),
        {"text": {"model": "ensemble", "input": _TEXT}},
    ),
    _Post(
        "/v1/score/evaluation",
        "evaluation",
        (llamafactory.ScoreEvaluationRequest,),
        (llamafactory.ScoreEvaluationAnswer,),
        {"texts": {"model": "model", "messages": [_TEXT]}},
    ),
)
_REFRESH = "/v1/refresh"
_GETS = (
    ("/v1/models", "models"),
    ("/health", "health"),
    ("/ready", "ready"),
    ("/metrics", "metrics"),
)


def describe(app: FastAPI, routes: Routes, wrap: Callable[[Handler], Handler]) -> list[str]:
    """Add every route to the application, and return the paths.

    Parameters
    ----------
    app : FastAPI
    routes : Routes
        The handlers.
    wrap : callable
        Makes their exceptions answers.
    """
    for post in _POSTS:
        _add(app, post.path, wrap(getattr(routes, post.handler)), post.methods, _REFUSALS)
    also = {code: _REFUSALS[code] for code in (401, 500, 503)}
    _add(app, _REFRESH, wrap(routes.refresh), ("POST",), also)
    for path, name in _GETS:
        codes = {code: _REFUSALS[code] for code in ((503,) if path in OPEN else (401, 503))}
        methods = ("GET", "HEAD") if path in OPEN else ("GET",)  # some balancers ask by HEAD
        _add(app, path, wrap(getattr(routes, name)), methods, codes)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return [post.path for post in _POSTS] + [_REFRESH, "/openapi.json"] + [p for p, _ in _GETS]


def _add(
    app: FastAPI, path: str, handler: Handler, methods: tuple[str, ...], codes: dict[int, str]
) -> None:
    shown = {code: {"model": ErrorAnswer, "description": text} for code, text in codes.items()}
    if len(methods) > 1:  # FastAPI describes one route once a method, under one name
        app.add_api_route(path, handler, methods=list(methods), include_in_schema=False)
    app.add_api_route(
        path,
        handler,
        methods=[methods[0]],
        operation_id=handler.__name__,
        summary=(handler.__doc__ or "").strip().splitlines()[0],
        response_model=None,
        responses=cast(Any, shown),
    )


def _schema(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's description, with the bodies and answers that it does not see."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    said = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    models = [(model, "validation") for post in _POSTS for model in post.bodies]
    models += [(model, "serialization") for post in _POSTS for model in post.answers]
    models += [(native.RefreshAnswer, "serialization"), (ErrorAnswer, "serialization")]
    refs, defined = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    schemas = said.setdefault("components", {}).setdefault("schemas", {})
    schemas |= defined["$defs"]
    for post in _POSTS:
        answers: list[dict[str, Any]] = [
            dict(refs[model, "serialization"]) for model in post.answers
        ]
        if post.listed:
            answers.append({"type": "array", "items": answers[-1]})
        bodies = [dict(refs[model, "validation"]) for model in post.bodies]
        operations = said["paths"][post.path]
        operation = operations["post"]
        examples = {name: {"value": one} for name, one in post.examples.items()}
        content = {"schema": _either(bodies), "examples": examples}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        _answers(operation, _either(answers))
        for method in post.methods[1:]:
            name = f"{operation['operationId']}_{method.lower()}"
            operations[method.lower()] = deepcopy(operation) | {"operationId": name}
    _answers(said["paths"][_REFRESH]["post"], dict(refs[native.RefreshAnswer, "serialization"]))
    said["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
        "text/plain": {"schema": {"type": "string"}}
    }
    _secure(said)
    app.openapi_schema = said
    return said


def _either(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _answers(operation: dict[str, Any], schema: dict[str, Any]) -> None:
    header = {"description": "the ensemble's version", "schema": {"type": "string"}}
    operation["responses"]["200"] = {
        "description": "Scored.",
        "headers": {VERSION_HEADER: header},
        "content": {"application/json": {"schema": schema}},
    }


def _secure(said: dict[str, Any]) -> None:
    """Say where a token may be asked for; a server on this machine alone asks for none."""
    said["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in said["paths"].items():
        if path not in OPEN:
            for operation in operations.values():
                operation["security"] = [{"token": []}, {}]
