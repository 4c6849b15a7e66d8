"""A server killed in mid-load and started again: nobody loses a score, nobody gets two."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ensemble_rm import Sample
from ensemble_rm.members import ClientOptions, RemoteScorer
from tests.support import SUPPORT, wire_doubles as doubles

DOUBLES = SUPPORT / "wire_doubles.py"
CLIENTS, CALLS, SAMPLES = 6, 10, 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(name: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, str(DOUBLES), name, str(port)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("name", "protocol"), [("openrlhf", "openrlhf"), ("vllm", "vllm-classify"), ("tei", "tei")]
)
@pytest.mark.parametrize("kills", [1, 3])
def test_clients_lose_nothing(name: str, protocol: str, kills: int) -> None:
    """The server is killed while requests are under way, as often as asked, and comes back."""
    port = free_port()
    scorer = RemoteScorer(
        f"http://127.0.0.1:{port}",
        protocol=protocol,
        name="far",
        template="plain",
        batch_size=2,
        # It is not there yet when the first client asks, either.
        client=ClientOptions(backoff=0.02, max_backoff=0.2, reset_after=0.1, deadline=300),
    )
    found: dict[tuple[int, int], list[float]] = {}
    done, killed = threading.Semaphore(0), threading.Event()

    def load(client: int) -> None:
        for call in range(CALLS):
            if call == CALLS - 1:  # nobody is through before the last kill, however late it comes
                assert killed.wait(600)
            samples = [Sample("", f"{client} {call} {i}") for i in range(SAMPLES)]
            found[client, call] = scorer.score(samples)[:, 0].tolist()
            done.release()

    threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        with server(name, port) as process:
            for _ in range(CLIENTS * CALLS // (2 * (kills + 1))):
                assert done.acquire(timeout=300)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert all(thread.is_alive() for thread in threads)  # killed in mid-load
    killed.set()
    with server(name, port):
        for thread in threads:
            thread.join(timeout=300)
        assert not any(thread.is_alive() for thread in threads)
        scorer.close()
    assert len(found) == CLIENTS * CALLS
    for (client, call), scores in found.items():
        expected = [doubles.logit_of(f"{client} {call} {i}") for i in range(SAMPLES)]
        assert scores == pytest.approx(expected, rel=1e-6)
