"""A short soak of the server: no answer is lost under kills, slow clients and disconnects."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.serving import serving_soak
from tests.support.server_runs import Process, one, server

pytestmark = pytest.mark.slow


class Restarted:
    """A server that comes back to its port after each kill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.lives = folder, 0, 0
        self._stack = ExitStack()
        self._running: Process | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return None if self._running is None else self._running.process

    def start(self) -> None:
        self.lives += 1
        folder = self.folder / str(self.lives)
        folder.mkdir()
        options = ("--slow-seconds", 0.001, "--rows", 16, "--port", self.port)
        options += ("--header-seconds", 1)
        self._running = self._stack.enter_context(server(folder, *options))
        self.port = self._running.port

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def resident(self) -> float:
        return 1.0

    def close(self) -> None:
        self._stack.close()


def test_nothing_is_lost_doubled_or_mixed_up(tmp_path: Path) -> None:
    texts = ["slow" + "x" * i for i in range(64)]
    works = [("/v1/score", one(text, f"prompt {i // 16}")) for i, text in enumerate(texts)]
    marks = [2.0 * len(text) for text in texts]  # the second member's
    running = Restarted(tmp_path)
    running.start()
    try:
        run = serving_soak.Soak(running, works, marks, rate=40.0, seconds=12.0)
        asyncio.run(run.run())
        assert running.process is not None and running.process.poll() is None
    finally:
        running.close()
    assert len(run.kills) == len(serving_soak.KILLS) == running.lives - 1
    assert run.sent > 0 and len(run.answers) == run.sent
    assert run.lost() == 0
    assert run.mixed_up() == 0
    # Had one answer been another's, it would have been seen.
    run.marks = marks[1:] + marks[:1]
    assert run.mixed_up() == run.sent
