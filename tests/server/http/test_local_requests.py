"""A server without a token, and what a web page of another site makes a browser send to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st
from starlette.testclient import TestClient

from ensemble_rm.errors import ForbiddenError
from ensemble_rm.server.http.auth import check_local
from tests.support.server_process import lengths
from tests.support.server_runs import client, one

LOOPBACK = ["127.0.0.1", "127.0.0.1:8000", "localhost", "localhost:8000", "[::1]", "[::1]:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "10.0.0.1", "127.0.0.1.evil.example", "[::1", "a@b"]
FOREIGN += ["localhost.evil.example:8000", "[2001:db8::1]:80"]
ROUTES = [("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/refresh")]
ROUTES += [("POST", "/v1/score"), ("GET", "/openapi.json")]


@pytest.fixture(scope="module")
def local() -> Iterator[TestClient]:
    with client(lengths()) as opened:
        yield opened


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("host", FOREIGN)
def test_another_host_is_refused(local: TestClient, method: str, path: str, host: str) -> None:
    answer = local.request(method, path, json={}, headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "ForbiddenError" and host not in answer.text


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"]
)
def test_another_origin_is_refused(local: TestClient, method: str, path: str, origin: str) -> None:
    assert local.request(method, path, json={}, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_is_answered(local: TestClient, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert local.post("/v1/score", json=one("Hello"), headers=headers).status_code == 200


def test_with_a_token_any_host_is_answered() -> None:
    with client(lengths(), token="a secret of length".replace(" ", "-")) as guarded:
        headers = {"host": "rewards.example", "origin": "https://evil.example"}
        headers["authorization"] = "Bearer a-secret-of-length"
        assert guarded.post("/v1/score", json=one("Hello"), headers=headers).status_code == 200


def test_health_needs_no_host(local: TestClient) -> None:
    assert local.get("/health", headers={"host": "10.0.0.1"}).status_code == 200


@given(st.binary(), st.none() | st.binary())
def test_any_bytes_are_loopback_or_refused(host: bytes, origin: bytes | None) -> None:
    headers = {b"host": host} | ({} if origin is None else {b"origin": origin})
    try:
        check_local(headers)
    except ForbiddenError:
        return
    assert not host or b"127." in host or b"localhost" in host.lower() or b":" in host


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_form_does_not_refresh(local: TestClient, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    assert local.post("/v1/refresh", content=b"{}", headers=headers).status_code == 415
    assert local.post("/v1/refresh", json={"a": 1}).status_code == 422
    assert local.post("/v1/refresh", json={}).status_code == 200
