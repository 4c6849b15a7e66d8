"""Servers for tests: in this process by ASGI, and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from ensemble_rm import RewardEnsemble
from ensemble_rm.server.http.app import create_app
from ensemble_rm.server.http.auth import Token
from ensemble_rm.server.options import ServerOptions
from tests.support import CHECKOUT, SUPPORT

LOCAL = "http://127.0.0.1"  # a server without a token answers no other name


@contextmanager
def client(
    ensemble: RewardEnsemble | Callable[[], RewardEnsemble],
    options: ServerOptions | None = None,
    *,
    token: str | None = None,
) -> Iterator[TestClient]:
    """A client of a server in this process."""
    load = (lambda: ensemble) if isinstance(ensemble, RewardEnsemble) else ensemble
    app = create_app(load, options, token=None if token is None else Token(token))
    with TestClient(app, LOCAL, raise_server_exceptions=True) as found:
        yield found


class Process:
    """A server in a process of its own."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.log = (folder / "server.log").open("wb")
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=self.log, stderr=self.log, env=environment
        )
        self.port = 0
        self.headers: dict[str, str] = {}

    def request(
        self, method: str, path: str, body: Any = None, *, timeout: float = 120, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Ask, and return status, JSON and headers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            said = body if body is None or isinstance(body, bytes) else json.dumps(body)
            sent = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, said, sent | self.headers | headers)
            answer = connection.getresponse()
            text = answer.read()
            named = {name.lower(): value for name, value in answer.getheaders()}
            is_json = named.get("content-type", "").startswith("application/json")
            return answer.status, json.loads(text) if is_json else text.decode(), named
        finally:
            connection.close()

    def reward(self, completion: str, **options: Any) -> float:
        """Score one completion."""
        status, said, _ = self.request("POST", "/v1/score", one(completion), **options)
        assert status == 200, said
        return float(said["rewards"][0])

    def metric(self, name: str) -> float:
        """Read one figure; 0 where it is not there yet."""
        _, text, _ = self.request("GET", "/metrics")
        rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
        return sum(
            float(value) for key, value in rows if key.split("{")[0] == f"ensemble_rm_{name}"
        )

    def wait(self, holds: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until something holds; not for a measured time."""
        until = time.monotonic() + seconds
        while not _quietly(holds):
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < until, "it never came to hold"
            time.sleep(0.02)

    def wait_ready(self) -> None:
        self.wait(lambda: self.request("GET", "/ready")[0] == 200)

    def log_text(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8")


def _quietly(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except OSError:
        return False


@contextmanager
def server(folder: Path, *options: object, ready: bool = True) -> Iterator[Process]:
    """`server_process.py` with these options, until it is told to stop."""
    file = folder / "port"
    file.unlink(missing_ok=True)
    command = [str(SUPPORT / "server_process.py"), "--port-file", str(file)]
    found = Process([*command, *map(str, options)], folder)
    try:
        found.wait(file.exists)
        found.port = int(file.read_text())
        if ready:
            found.wait_ready()
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.wait()
        found.log.close()


def one(completion: str, prompt: str = "Hi") -> dict[str, Any]:
    """The body of a request that scores one completion."""
    return {"samples": [{"prompt": prompt, "completion": completion}]}
