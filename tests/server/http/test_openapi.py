"""A running server against its own OpenAPI description, and against any JSON at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from ensemble_rm.server.http.openapi import describe
from ensemble_rm.server.wire.registry import routes_by_path
from tests.support.server_runs import Process, server

PATHS = ("/v1/score", "/v1/compare", "/get_reward", "/classify", "/v1/embeddings")
PATHS += ("/v1/score/evaluation",)

pytestmark = pytest.mark.slow  # starts a process


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("server")
    names = ("--raw-text-members", "length", "twice", "--stop", "<|im_end|>")
    with server(folder, *names) as found:
        yield found
        assert found.process.poll() is None
        assert "unexpected" not in found.log_text()


DESCRIPTION = describe(routes_by_path())
described = schemathesis.openapi.from_dict(DESCRIPTION)


def fits_description(case: schemathesis.Case) -> bool:
    """Whether the body of a case is right by the description."""
    # Cases of methods that the path does not have are among the negative ones.
    operation = DESCRIPTION["paths"][case.path].get(case.method.lower(), {})
    if "requestBody" not in operation or not isinstance(case.body, dict | list):
        return False
    return body_validator(operation).is_valid(case.body)


def body_validator(operation: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    shared = {"components": DESCRIPTION["components"]}
    return jsonschema_rs.Draft202012Validator(schema | shared)


@described.parametrize()
@settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_server_keeps_to_its_description(running: Process, case: schemathesis.Case) -> None:
    # What no schema says: the last message is the assistant's; three lists have one length.
    loose = case.path in ("/classify", "/get_reward")
    names = ["positive_data_acceptance"] if loose else []
    # A case made by leaving one branch of a oneOf may land in another, and is then no wrong body.
    names += ["negative_data_rejection"] if fits_description(case) else []
    excluded = [schemathesis.checks.CHECKS.get_one(name) for name in names]
    url = f"http://127.0.0.1:{running.port}"
    case.call_and_validate(base_url=url, excluded_checks=excluded)


leaves = st.none() | st.booleans() | st.integers() | st.text()
leaves |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
keys = ["samples", "pairs", "query", "prompts", "labels", "input", "text", "messages"]
bodies = st.dictionaries(st.sampled_from(keys), values, max_size=4) | values


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), bodies)
def test_any_json_is_answered(running: Process, path: str, body: Any) -> None:
    status, said, _ = running.request("POST", path, json.dumps(body).encode())
    assert status in (200, 400, 409, 422), json.dumps(said)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.binary(max_size=200))
def test_any_bytes_are_answered(running: Process, path: str, body: bytes) -> None:
    status, said, _ = running.request("POST", path, body)
    assert status in (200, 400, 409, 422), json.dumps(said)
