"""The OpenAPI description of a server, made from the wire formats' routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from ensemble_rm import __version__
from ensemble_rm.server.wire.format import Route

VERSION_HEADER = "x-ensemble-version"
UNGUARDED = frozenset({"/health", "/ready"})
"""Paths that load balancers may ask for without a token."""
OPERATIONS = {
    "/v1/refresh": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/ready": "GET",
    "/metrics": "GET",
}
"""Paths that belong to no wire format, and their methods."""
_REF = "#/components/schemas/{model}"
_SUMMARIES = {
    "/v1/refresh": "Serve the version that is current in the ensemble's folder now.",
    "/v1/models": "The ensemble's name and version, as OpenAI's clients read them.",
    "/health": "Whether the process is alive.",
    "/ready": "Whether requests are served: loaded, warmed up and not shutting down.",
    "/metrics": "Metrics for Prometheus.",
}
_ERRORS = {
    400: "Body is not valid JSON.",
    401: "No token, or a wrong one.",
    403: "The server has no token, and Host or Origin is not this machine.",
    408: "Body did not arrive in time.",
    409: "No calibration for this aggregator.",
    413: "A limit is exceeded.",
    415: "Body is not declared as JSON, or is compressed.",
    422: "Body has another shape, or samples that cannot be scored.",
    429: "Queue is full; retry after Retry-After seconds.",
    500: "Scoring failed, with the error's name.",
    502: "A member's server refuses, or its response cannot be read.",
    503: "Not loaded yet, shutting down, or a member's server is unreachable.",
}


class ErrorDetail(BaseModel):
    """What went wrong; never the request's text."""

    message: str
    type: str
    param: None = None
    code: int


class ErrorAnswer(BaseModel):
    """A refusal or a failure; it never looks like a reward."""

    error: ErrorDetail


class RefreshRequest(BaseModel):
    """Nothing: the version to serve is the folder's current one."""

    model_config = ConfigDict(extra="forbid")


class RefreshAnswer(BaseModel):
    """The version that is served now."""

    version: str
    changed: bool


def describe(formats: Mapping[str, Sequence[Route]]) -> dict[str, Any]:
    """Return the OpenAPI description.

    Parameters
    ----------
    formats : mapping of str to sequence of Route
        The wire formats' routes by path.
    """
    routes = [route for same in formats.values() for route in same]
    requests = [(route.request, "validation") for route in routes]
    requests.append((RefreshRequest, "validation"))
    responses = [(route.response, "serialization") for route in routes]
    own = [(model, "serialization") for model in (RefreshAnswer, ErrorAnswer)]
    refs, definitions = models_json_schema(
        [*requests, *responses, *own],  # type: ignore[list-item]
        ref_template=_REF,
    )
    error = _json(refs[ErrorAnswer, "serialization"])
    paths = {path: _of_formats(path, same, refs, error) for path, same in formats.items()}
    for path, method in OPERATIONS.items():
        codes = [503] if path in UNGUARDED else [401, 403, 503]
        operation = _operation(path, _SUMMARIES[path], codes, error)
        paths[path] = {method.lower(): operation}
        if path == "/v1/refresh":
            operation["responses"] |= _success(refs[RefreshAnswer, "serialization"])
            operation["responses"] |= _errors([400, 408, 413, 415, 422, 500], error)
            content = _json(refs[RefreshRequest, "validation"])
            operation["requestBody"] = {"required": True, "content": content}
        if path == "/metrics":
            text = {"text/plain": {"schema": {"type": "string"}}}
            operation["responses"]["200"]["content"] = text
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ensemble-rm",
            "version": __version__,
            "summary": "Rewards from an ensemble of reward models.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _of_formats(
    path: str, routes: Sequence[Route], refs: Mapping[Any, Any], error: dict[str, Any]
) -> dict[str, Any]:
    """Return the operations of a path, one per method; formats that share it are alternatives."""
    bodies, answers = [], []
    for route in routes:
        bodies.append(refs[route.request, "validation"])
        answers.append(refs[route.response, "serialization"])
        if route.listed:
            answers.append({"type": "array", "items": answers[-1]})
    examples = {
        name: {"value": value} for route in routes for name, value in route.examples.items()
    }
    summaries = [(route.handler.__doc__ or path).strip().splitlines()[0] for route in routes]
    operations = {}
    for method in routes[0].methods:
        operation = _operation(path, " ".join(summaries), list(_ERRORS), error)
        operation["operationId"] += "" if method == routes[0].methods[0] else f"_{method.lower()}"
        content = _json(_any_of(bodies))["application/json"] | {"examples": examples}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        operation["responses"] |= _success(_any_of(answers))
        operations[method.lower()] = operation
    return operations


def _operation(
    path: str, summary: str, codes: Sequence[int], error: dict[str, Any]
) -> dict[str, Any]:
    operation = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace(".", "_"),
        "responses": {"200": {"description": "Success.", "content": _json({})}}
        | _errors(codes, error),
    }
    if path not in UNGUARDED:
        # The empty alternative: a server on the loopback address asks for no token.
        operation["security"] = [{"token": []}, {}]
    return operation


def _errors(codes: Sequence[int], error: dict[str, Any]) -> dict[str, Any]:
    return {str(code): {"description": _ERRORS[code], "content": error} for code in codes}


def _success(schema: dict[str, Any]) -> dict[str, Any]:
    header = {"description": "Version of the ensemble.", "schema": {"type": "string"}}
    headers = {VERSION_HEADER: header}
    return {"200": {"description": "Success.", "headers": headers, "content": _json(schema)}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _any_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    distinct = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}
