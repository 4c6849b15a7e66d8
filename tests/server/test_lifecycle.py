"""A server's life: loading, draining, kills, clients that are slow or leave."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from tests.support.server_process import begun
from tests.support.server_runs import Process, one, server

pytestmark = pytest.mark.slow  # they start processes


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Path]]:
    """One server for all tests that leave it as they found it, and the file that frees "held"."""
    folder = tmp_path_factory.mktemp("shared")
    go = folder / "go"
    with server(folder, "--hold", go, "--rows", 1) as running:
        yield running, go


@pytest.fixture
def holding(shared: tuple[Process, Path]) -> Iterator[tuple[Process, Path]]:
    """The shared server, whose held samples wait until `go` is there."""
    running, go = shared
    go.unlink(missing_ok=True)
    begun(go).unlink(missing_ok=True)
    yield running, go
    go.touch()
    running.wait(lambda: running.metric("queue_samples") == 0)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with short deadlines for headers and bodies."""
    folder = tmp_path_factory.mktemp("impatient")
    with server(folder, "--header-seconds", 0.5, "--body-seconds", 0.5) as running:
        yield running


def test_it_listens_while_it_loads(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with server(tmp_path, "--load-when", go, ready=False) as running:
        assert running.request("GET", "/health")[0] == 200
        status, said, headers = running.request("GET", "/ready")
        assert (status, said["error"]["type"]) == (503, "NotReadyError")
        assert headers["retry-after"] == "1"
        assert running.request("POST", "/v1/score", one("Hello"))[0] == 503
        go.touch()
        running.wait_ready()
        assert running.reward("Hello") == 7.5


def test_the_event_loop_does_not_wait_for_scoring(holding: tuple[Process, Path]) -> None:
    running, go = holding
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(running.reward, "held")
        running.wait(begun(go).exists)
        for _ in range(5):
            assert running.request("GET", "/health")[0] == 200
        assert not scoring.done()
        go.touch()
        assert scoring.result() == 6.0


def begin(running: Process, pool: ThreadPoolExecutor, n: int) -> list[Future[float]]:
    """Send n requests that are held, and wait until one is being scored and the others wait."""
    asked = [pool.submit(running.reward, "held" + "x" * i) for i in range(n)]
    running.wait(lambda: running.metric("queue_samples") == n - 1)
    return asked


def refuses(running: Process) -> bool:
    """Whether nothing listens at its port any more."""
    try:
        socket.create_connection(("127.0.0.1", running.port), timeout=300).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_signal_lets_it_finish_what_it_accepted(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with server(tmp_path, "--hold", go, "--rows", 1) as running, ThreadPoolExecutor(8) as pool:
        asked = begin(running, pool, 8)
        running.process.send_signal(signal.SIGTERM)
        running.wait(lambda: refuses(running))
        go.touch()
        assert [f.result() for f in asked] == [1.5 * (4 + i) for i in range(8)]
        assert running.process.wait(timeout=300) == 0
        with pytest.raises(OSError, match=r"refused|reset"):
            running.request("GET", "/health")


def test_it_is_not_ready_while_it_drains_and_serves_all_the_same(tmp_path: Path) -> None:
    with server(tmp_path, "--drain-seconds", 600) as running:
        running.process.send_signal(signal.SIGTERM)
        running.wait(lambda: running.request("GET", "/ready")[0] == 503)
        assert running.reward("Hello") == 7.5
        running.process.send_signal(signal.SIGTERM)  # the second waits no more
        assert running.process.wait(timeout=300) == 0


NEVER = "never"  # is there


def test_what_takes_too_long_to_finish_is_refused(tmp_path: Path) -> None:
    """Neither the queue nor the process waits for a call that does not come back."""
    with (
        server(tmp_path, "--hold", tmp_path / NEVER, "--rows", 1, "--stop-seconds", 1) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        body = one("held")
        asked = [pool.submit(running.request, "POST", "/v1/score", body) for _ in range(3)]
        running.wait(lambda: running.metric("queue_samples") >= 2)
        running.process.send_signal(signal.SIGTERM)
        for future in asked:
            status, said, _ = future.result()
            assert (status, said["error"]["type"]) == (503, "NotReadyError")
        assert running.process.wait(timeout=300) == 0


def test_a_signal_ends_a_load_that_does_not_end(tmp_path: Path) -> None:
    with server(tmp_path, "--load-when", tmp_path / NEVER, ready=False) as running:
        running.wait(lambda: running.request("GET", "/health")[0] == 200)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=300) == 0


def retried(running: Process, completion: str, prompt: str) -> float:
    """Score one completion, however often that takes."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        try:
            status, said, _ = running.request("POST", "/v1/score", one(completion, prompt))
        except (OSError, HTTPException, json.JSONDecodeError):
            time.sleep(0.05)
            continue
        if status == 200:
            return float(said["rewards"][0])
        assert status in (429, 503), said
        time.sleep(0.05)
    raise AssertionError("no answer")


def test_clients_that_try_again_lose_nothing_to_a_kill(tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    go = tmp_path / "go"
    options = ("--slow-seconds", 0.02, "--hold", go)
    with ThreadPoolExecutor(8) as pool, server(tmp_path, *options, "--rows", 4) as running:
        # The second half is held: it does not end before the kill.
        texts = [("slow" if i < 40 else "held") + "x" * i for i in range(80)]
        asked = [pool.submit(retried, running, text, f"p{len(text) % 4}") for text in texts]
        running.wait(lambda: running.metric("samples_total") >= 10)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        assert not all(f.done() for f in asked)
        go.touch()
        with server(again, *options, "--port", running.port):
            assert [f.result() for f in asked] == [1.5 * len(text) for text in texts]


# Slow clients and those that leave -------------------------------------------------------------


def raw(running: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=300)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionResetError):  # behind the answer, of who sends on
        while block := connection.recv(4096):
            found += block
    return found


def serves(running: Process) -> bool:
    """Whether it scores; a request that this machine is too busy to send in time is refused."""
    status, said, _ = running.request("POST", "/v1/score", one("Hello"))
    return bool(status == 200 and said["rewards"] == [7.5])


def test_headers_that_come_byte_by_byte_time_out(impatient: Process) -> None:
    with raw(impatient) as loris:
        stop = threading.Event()

        def drip() -> None:
            for byte in b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000:
                if stop.wait(0.05):
                    return
                try:
                    loris.send(bytes([byte]))
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        impatient.wait(lambda: serves(impatient))  # others are served meanwhile
        answer = read_all(loris)
        stop.set()
        dripping.join()
        assert answer.startswith(b"HTTP/1.1 408")


def test_silence_times_out_before_and_between_requests(impatient: Process) -> None:
    with raw(impatient) as silent:
        assert read_all(silent).startswith(b"HTTP/1.1 408")

    def served_first() -> bool:
        with raw(impatient) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            answer = read_all(second)
        head, _, rest = answer.partition(b"\r\n\r\n")
        # Or this machine was too busy to send even the first in time.
        assert b"HTTP/1.1 408" in (rest if head.startswith(b"HTTP/1.1 200") else head)
        return head.startswith(b"HTTP/1.1 200")

    impatient.wait(served_first)


def test_a_body_that_does_not_come_times_out(impatient: Process) -> None:
    for headers in (b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"):

        def late(headers: bytes = headers) -> bool:
            with raw(impatient) as slow:
                slow.sendall(
                    b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\n" + headers + b"\r\n"
                )
                answer = read_all(slow)
            # Or this machine was too busy to send even the headers in time.
            assert answer.startswith(b"HTTP/1.1 408")
            return b"SlowRequestError" in answer and b"body did not arrive" in answer

        impatient.wait(late)
    impatient.wait(lambda: serves(impatient))


def test_a_body_in_chunks_is_counted_as_it_comes(holding: tuple[Process, Path]) -> None:
    running, _ = holding
    with raw(running) as large:
        large.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        try:
            for _ in range(64):
                large.sendall(chunk)
        except OSError:  # it stopped reading
            pass
        else:
            pytest.fail("64 MiB were read")
        assert running.reward("Hello") == 7.5


def test_a_client_that_sends_too_much_sees_why(holding: tuple[Process, Path]) -> None:
    running, _ = holding
    connection = HTTPConnection("127.0.0.1", running.port, timeout=300)
    body = b" " * (30 * 2**20)  # more than sockets hold
    connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def test_connections_over_the_limit_are_refused_and_counted(tmp_path: Path) -> None:
    """Those that are open already are served, the last of them too."""
    with server(tmp_path, "--max-connections", 2) as running:
        first = HTTPConnection("127.0.0.1", running.port, timeout=300)
        first.request("GET", "/health")
        assert first.getresponse().read()
        with raw(running) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert second.recv(4096).startswith(b"HTTP/1.1 200")
            with raw(running) as third:
                third.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = read_all(third)
                assert answer.startswith(b"HTTP/1.1 503") and b"NotReadyError" in answer
            first.request("GET", "/metrics")
            counted = 'ensemble_rm_requests_total{path="other",status="503"} 1.0'
            assert counted in first.getresponse().read().decode()
        first.close()
        running.wait(lambda: running.request("GET", "/health")[0] == 200)


def test_what_its_client_gave_up_on_is_not_scored(holding: tuple[Process, Path]) -> None:
    running, go = holding
    scored = running.metric("samples_total")
    dropped = running.metric("dropped_requests_total")
    body = json.dumps(one("held")).encode()
    gone = [raw(running) for _ in range(10)]
    for connection in gone:
        connection.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
    running.wait(lambda: running.metric("queue_samples") == 9)
    for connection in gone:
        connection.close()
    running.wait(lambda: running.metric("dropped_requests_total") == dropped + 10)
    assert running.metric("queue_samples") == 0
    go.touch()
    assert running.reward("Hello") == 7.5
    assert running.metric("samples_total") == scored + 2  # that in work, and the last


def test_a_full_queue_is_429_with_a_time_to_come_again(tmp_path: Path) -> None:
    go = tmp_path / "go"
    options = ("--hold", go, "--rows", 1, "--queue-samples", 4)
    with server(tmp_path, *options) as running, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(running.reward, "held")]
        running.wait(begun(go).exists)
        asked += [pool.submit(running.reward, "held") for _ in range(4)]
        running.wait(lambda: running.metric("queue_samples") == 4)
        body = {"samples": one("held")["samples"] * 3}
        status, said, headers = running.request("POST", "/v1/score", body)
        assert (status, said["error"]["type"]) == (429, "QueueFullError")
        assert 1 <= int(headers["retry-after"]) <= 60
        go.touch()
        assert [f.result() for f in asked] == [6.0] * 5
