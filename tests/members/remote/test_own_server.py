"""A remote member against this library's own server, killed in mid-load and started again."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import Message, RewardEnsemble, Sample
from ensemble_rm.aggregation import lcb
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members import ClientOptions, HeadScorer, RemoteScorer

pytestmark = pytest.mark.slow
CLIENTS, CALLS = 4, 8


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    words = ["-m", "ensemble_rm", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *words])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def own(port: int, **options: float) -> RemoteScorer:
    # It takes a while to load, and is not there yet when the first client asks.
    client = ClientOptions(backoff=0.05, max_backoff=0.5, reset_after=0.2, deadline=300, **options)  # type: ignore[arg-type]
    return RemoteScorer(
        f"http://127.0.0.1:{port}",
        protocol="ensemble-rm",
        name="own",
        template="sample",
        raw_logit_check="off",
        batch_size=3,
        client=client,
    )


def texts(client: int, call: int) -> list[Sample]:
    asked = (Message("user", f"question {client}"), Message("assistant", "?"), Message("user", "x"))
    prompts = [f"question {client}", asked, "other"]
    return [Sample(prompt, f"answer {call} {i} " * i) for i, prompt in enumerate(prompts * 2, 1)]


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_clients_of_our_server_lose_nothing(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    """Every reward is that of the ensemble itself, through two kills."""
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), lcb(kappa=0.5))
    ensemble.save_pretrained(tmp_path / "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    scorer = own(port)
    found: dict[tuple[int, int], list[float]] = {}
    done, killed = threading.Semaphore(0), threading.Event()

    def load(client: int) -> None:
        for call in range(CALLS):
            if call == CALLS - 1:  # nobody is through before the last kill, however late it comes
                assert killed.wait(600)
            found[client, call] = scorer.score(texts(client, call))[:, 0].tolist()
            done.release()

    threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        with server(tmp_path / "run", port) as process:
            for _ in range(CLIENTS * CALLS // 6):
                assert done.acquire(timeout=300)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert all(thread.is_alive() for thread in threads)
    killed.set()
    with server(tmp_path / "run", port):
        for thread in threads:
            thread.join(timeout=300)
        scorer.close()
    assert len(found) == CLIENTS * CALLS
    for (client, call), rewards in found.items():
        expected = ensemble.score(texts(client, call)).reward
        np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)
