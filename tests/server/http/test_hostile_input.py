"""What should never reach a model: each is a 4xx with a name, none a crash, a leak or a reward."""

from __future__ import annotations

import gzip
import json
import logging
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from starlette.testclient import TestClient

from ensemble_rm.errors import OptionError, ServerError
from ensemble_rm.server.http import app
from ensemble_rm.server.http.auth import Token, check_bind
from ensemble_rm.server.options import Limits, ServerOptions
from ensemble_rm.server.wire.raw_text import RawText
from tests.support.server_process import lengths
from tests.support.server_runs import client, one

SECRET = "correct-horse-battery-staple"
MARK = "zebra-crossing"  # stands in every hostile text, and in no answer and no log
LIMITS = Limits(max_body_bytes=200_000, max_samples=8, max_characters=20_000, max_tokens=30_000)
OPEN_TEXT = RawText(raw_text_members=("length", "twice"))
PATHS = ("/v1/score", "/v1/compare", "/get_reward", "/classify", "/v1/embeddings")
PATHS += ("/v1/score/evaluation",)


@pytest.fixture(scope="module")
def asking() -> Iterator[TestClient]:
    options = ServerOptions(limits=LIMITS, raw_text=OPEN_TEXT)
    with client(lengths(), options) as found:
        yield found


def sample(**fields: Any) -> dict[str, Any]:
    return {"samples": [{"prompt": MARK, "completion": MARK} | fields]}


def deep(levels: int) -> bytes:
    return b'{"samples": ' + b"[" * levels + b"]" * levels + b"}"


RAW: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "no JSON": (MARK.encode(), 400),
    "cut": (b'{"samples": [{"prompt": "' + MARK.encode(), 400),
    "NaN": (b'{"samples": [{"prompt": "' + MARK.encode() + b'", "completion": NaN}]}', 400),
    "infinity": (b'{"samples": Infinity}', 400),
    "minus infinity": (b'{"samples": -Infinity}', 400),
    "a number out of range": (b'{"samples": 1e999}', 422),
    "5000 digits": (b'{"samples": ' + b"1" * 5000 + b"}", 400),
    "lone surrogate": (b'{"samples": [{"prompt": "\\ud800", "completion": "a"}]}', 400),
    "lone low surrogate": (b'{"samples": [{"prompt": "\\udc00", "completion": "a"}]}', 400),
    "no UTF-8": (b'{"samples": [{"prompt": "\xff\xfe", "completion": "a"}]}', 400),
    "UTF-16": (json.dumps(sample()).encode("utf-16"), 400),
    "BOM": (b"\xef\xbb\xbf{}", 400),
    "deep": (deep(1_000), 400),
    "very deep": (deep(20_000), 400),
    "deeper than is parsed": (deep(90_000), 413),
    "too large": (json.dumps(sample(prompt=MARK * 20_000)).encode(), 413),
    "two documents": (b"{}{}", 400),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_request(asking: TestClient, case: str) -> None:
    body, status = RAW[case]
    for path in PATHS:
        answer = asking.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (path, answer.text)
        refused(answer.json(), answer.text)


def refused(said: dict[str, Any], text: str) -> None:
    assert set(said) == {"error"} and said["error"]["type"] and said["error"]["message"]
    assert MARK not in text


SHAPES: dict[str, Any] = {
    "a list": [],
    "null": None,
    "a string": MARK,
    "no samples": {},
    "none": {"samples": []},
    "samples null": {"samples": None},
    "samples of text": {"samples": [MARK]},
    "samples of null": {"samples": [None]},
    "prompt empty": sample(prompt=""),
    "prompt blank": sample(prompt=" \n\t"),
    "prompt null": sample(prompt=None),
    "prompt number": sample(prompt=3),
    "prompt object": sample(prompt={"role": "user", "content": MARK}),
    "no messages": sample(prompt=[]),
    "message text": sample(prompt=[MARK]),
    "message without role": sample(prompt=[{"content": MARK}]),
    "message without content": sample(prompt=[{"role": "user"}]),
    "role number": sample(prompt=[{"role": 1, "content": MARK}]),
    "role strange": sample(prompt=[{"role": f"{MARK} <b>", "content": "a"}]),
    "content parts": sample(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
    "completion null": sample(completion=None),
    "completion number": sample(completion=1.5),
    "completion list": sample(completion=[MARK]),
    "unknown field": sample(**{MARK: 1}),
    "unknown option": sample() | {MARK: True},
    "aggregator text": sample() | {"aggregator": "mean"},
    "aggregator unknown": sample() | {"aggregator": {"name": MARK}},
    "coefficient out of range": sample() | {"aggregator": {"name": "lcb", "kappa": -1}},
    "coefficient beyond all": sample() | {"aggregator": {"name": "uwo", "lam": 1e308}},
    "partial text": sample() | {"partial": "yes"},
}


@pytest.mark.parametrize("case", SHAPES)
def test_json_of_another_shape(asking: TestClient, case: str) -> None:
    body = json.dumps(SHAPES[case])
    headers = {"Content-Type": "application/json"}
    answer = asking.post("/v1/score", content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    refused(answer.json(), answer.text)


@pytest.mark.parametrize(
    "body",
    [
        sample(prompt=MARK * 2000),
        sample(completion=MARK * 2000),
        sample(reference=MARK * 2000),
        sample(prompt=[{"role": "user", "content": MARK * 2000}]),
        {"samples": sample()["samples"] * 9},
        {"samples": sample(completion="语" * 6700)["samples"] * 6},
    ],
)
def test_what_is_over_a_limit(asking: TestClient, body: Any) -> None:
    answer = asking.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "TooLargeError")
    refused(answer.json(), answer.text)


def test_a_prompt_of_a_megabyte_is_too_large_by_default() -> None:
    with client(lengths()) as asking:
        answer = asking.post("/v1/score", json=sample(prompt="x" * 2**20))
        assert answer.status_code == 413
        assert asking.post("/v1/score", json=sample()).status_code == 200


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_browsers_form_is_no_request(asking: TestClient, media: str) -> None:
    body = json.dumps(sample())
    answer = asking.post("/v1/score", content=body, headers={"Content-Type": media})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "MediaTypeError")


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity", MARK])
def test_a_compressed_body_is_no_request(asking: TestClient, coding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    for path in PATHS:
        answer = asking.post(path, content=gzip.compress(b"{}"), headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (415, "MediaTypeError")
        assert "Content-Encoding" in answer.json()["error"]["message"]
        refused(answer.json(), answer.text)
    plain = headers | {"Content-Encoding": "Identity"}
    body = json.dumps(sample())
    assert asking.post("/v1/score", content=body, headers=plain).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/score", 405), ("POST", "/", 404)]
)
def test_what_no_route_takes(asking: TestClient, method: str, path: str, status: int) -> None:
    answer = asking.request(method, path)
    assert answer.status_code == status
    refused(answer.json(), answer.text)


def test_failures_quote_nothing_in_answers_or_logs(caplog: pytest.LogCaptureFixture) -> None:
    def broken(s: Any) -> float:
        raise RuntimeError(f"cannot score {s.completion}")

    ensemble = lengths()
    object.__setattr__(ensemble.scorers[0], "_function", broken)
    with caplog.at_level(logging.DEBUG), client(lengths) as asking:
        service = asking.app.state.service  # type: ignore[attr-defined]
        service._served = type(service.served)(ensemble, "broken")
        answer = asking.post("/v1/score", json=sample())
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "sample 0: RuntimeError",
        "type": "RuntimeError",
        "param": None,
        "code": 500,
    }
    assert "RuntimeError" in caplog.text and MARK not in caplog.text


# Tokens ----------------------------------------------------------------------------------------


def basic(text: str) -> str:
    return f"Basic {b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong-but-long-enough",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET[:-1]}",
        f"Bearer {SECRET.upper()}",
        SECRET,
        f"Token {SECRET}",
        "Basic !!!",
        basic(SECRET),
        basic(f"{SECRET}:wrong"),
        "Bearer \xe9\xff",
    ],
)
def test_without_the_token_nothing_is_answered(header: str | None) -> None:
    with client(lengths(), token=SECRET) as asking:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in [*[("POST", path) for path in PATHS], ("POST", "/v1/refresh")]:
            answer = asking.request(method, path, content=MARK, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert SECRET not in answer.text
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert asking.get(path, headers=headers).status_code == 401
        for path in ("/health", "/ready"):
            assert asking.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("header", [f"Bearer {SECRET}", f"bearer {SECRET}", basic(f"any:{SECRET}")])
def test_with_the_token_everything_is(header: str) -> None:
    with client(lengths(), token=SECRET) as asking:
        headers = {"Authorization": header}
        assert asking.post("/v1/score", json=one("Hi"), headers=headers).status_code == 200
        assert asking.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ServerError, match="no token"):
        check_bind(host, None)
    check_bind(host, Token(SECRET))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_this_machine_needs_none(host: str) -> None:
    check_bind(host, None)


@pytest.mark.parametrize("secret", ["", "short", "with a space in the middle", "é" * 20])
def test_a_token_that_is_none(secret: str) -> None:
    with pytest.raises(OptionError, match="at least 16") as refused_token:
        Token(secret)
    assert not secret or secret not in str(refused_token.value)
    assert SECRET not in repr(Token(SECRET))


# Structure, counted before it is parsed ----------------------------------------------------------

NESTED = [b"[" + b"[]," * 2_000_000 + b"[]]", b"{" + b'"a":{},' * 900_000 + b'"a":{}}']
NESTED += [b'{"samples":' + b"[[[[[]]]]]," * 500_000 + b"[]}", b"[" + b"0," * 3_000_000 + b"0]"]


@pytest.mark.parametrize("body", NESTED, ids=range(len(NESTED)))
def test_a_body_of_nested_lists_is_never_parsed(
    asking: TestClient, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "parse_json", lambda _: pytest.fail("it was parsed"))
    answer = asking.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "text", ['a,[{"' * 150_000, ',"' * 300_000, "\\" * 500_000 + "," * 600_000]
)
def test_texts_may_have_any_number_of_commas(text: str) -> None:
    app.check_structure(json.dumps(sample(completion=text)).encode(), Limits())


json_texts = st.recursive(
    st.none() | st.integers() | st.text('a,[]{}"\\'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('a,[{"\\'), inner),
)


@given(json_texts)
def test_the_structure_counted_is_that_outside_texts(value: Any) -> None:
    def count(value: Any) -> int:
        if not isinstance(value, list | dict):
            return 0
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(len(value) - 1, 0) + sum(map(count, inner))

    bare = app._STRING.sub(b"", json.dumps(value).encode())
    assert sum(map(bare.count, (b"[", b"{", b","))) == count(value)
