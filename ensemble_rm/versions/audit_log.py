"""The audit log: one JSON line per event, appended and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ensemble_rm.errors import SchemaError
from ensemble_rm.saved_json import parse_json

FILE = "audit.jsonl"
WITHDRAWN = "run withdrawn"


class AuditLog:
    """Lines of JSON in ``audit.jsonl``; a reader skips a line that was cut short.

    Parameters
    ----------
    folder : Path
        Of the versions.
    name : str
        Of the file.
    """

    def __init__(self, folder: Path, name: str = FILE) -> None:
        self.path = folder / name

    def append(self, event: Mapping[str, Any]) -> None:
        """Append one line, in one call, and wait until it is on the disk."""
        line = (json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n").encode()
        # O_APPEND and a single write: lines of two processes do not mix.
        opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.lseek(opened, 0, os.SEEK_END) > 0:
                os.lseek(opened, -1, os.SEEK_END)
                if os.read(opened, 1) != b"\n":
                    line = b"\n" + line  # the last writer was killed in the middle of its line
            if os.write(opened, line) < len(line):
                raise OSError(f"{self.path}: the line was cut short; the disk may be full")
            os.fsync(opened)
        finally:
            os.close(opened)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events, oldest first."""
        if not self.path.exists():
            return
        # A line may be cut inside a character; that must not make the others unreadable.
        with self.path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    event = parse_json(line)
                except SchemaError:
                    continue
                if isinstance(event, dict):
                    yield event

    def runs(self, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the events whose fields have the given values, without those of withdrawn runs.

        `Versions.withdraw_run` withdraws a run; its lines stay in the log.
        """
        events = list(self.read())
        withdrawn = {event.get("run") for event in events if event.get("event") == WITHDRAWN}
        for event in events:
            counts = event.get("run") is None or event["run"] not in withdrawn
            if counts and all(event.get(name) == value for name, value in fields.items()):
                yield event

    def last(self, **fields: Any) -> dict[str, Any] | None:
        """Return the last event of `runs`."""
        last = None
        for event in self.runs(**fields):
            last = event
        return last
