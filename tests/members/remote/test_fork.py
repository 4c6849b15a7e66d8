"""A remote member or a judge that was used before a fork serves the child and the parent alike."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from ensemble_rm import Sample
from ensemble_rm.members import ClientOptions, JudgeScorer, RemoteScorer
from ensemble_rm.members.remote.breaker import Breaker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

OPTIONS = ClientOptions(deadline=300, concurrency=2, reset_after=1000)


class Handler(BaseHTTPRequestHandler):
    """This library's own server and a judge, by the path; connections are kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/chat/completions"):
            said = str(body["messages"][-1]["content"].count("x"))
            answer: object = {"choices": [{"message": {"content": said}}]}
        else:
            answer = {"rewards": [s["completion"].count("x") for s in body["samples"]]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    connections = 0

    def process_request(self, request: object, client_address: object) -> None:
        self.connections += 1
        super().process_request(request, client_address)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def remote(port: int) -> RemoteScorer:
    return RemoteScorer(
        f"http://127.0.0.1:{port}",
        protocol="ensemble-rm",
        name="far",
        template="sample",
        raw_logit_check="off",
        batch_size=1,
        client=OPTIONS,
    )


def judge(port: int) -> JudgeScorer:
    url = f"http://127.0.0.1:{port}/v1"
    return JudgeScorer(url, model="m", name="far", logprobs=False, client=OPTIONS)


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns or raises in a forked child."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 - the parent is told
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return found


@pytest.mark.parametrize("make", [remote, judge])
def test_a_child_has_connections_of_its_own(
    make: Callable[[int], RemoteScorer | JudgeScorer],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However long the children take: httpx closes what has been idle for five seconds.
    monkeypatch.setattr(httpx, "Limits", partial(httpx.Limits, keepalive_expiry=None))
    scorer = make(server.server_address[1])

    def score() -> list[float]:
        return scorer.score([Sample("q", "x" * n) for n in range(1, 7)])[:, 0].tolist()

    expected = [float(n) for n in range(1, 7)]
    before = score()
    opened = server.connections
    assert before == expected
    for _ in range(2):
        assert in_child(score) == str(expected)
    assert in_child(lambda: (scorer.close(), score())[1]) == str(expected)
    after = server.connections
    assert after > opened  # the children's own,
    assert score() == expected
    assert server.connections == after  # and the parent's are open still
    scorer.close()


def test_a_child_has_a_circuit_of_its_own(server: Server) -> None:
    """One that the parent's probe holds would be held for ever."""
    scorer = remote(server.server_address[1])
    breaker: Breaker = scorer._client.breaker
    for _ in range(OPTIONS.open_after):
        breaker.failed(object())
    assert breaker.state == "open"
    assert in_child(lambda: scorer.score([Sample("q", "xx")]).tolist()) == "[[2.0]]"
    assert scorer._client.breaker is breaker and breaker.state == "open"
    scorer.close()
