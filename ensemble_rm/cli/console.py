"""What a command prints: progress, its result, and where the result went."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

EVERY = 30.0  # seconds between two lines of progress without a terminal


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: ``1 prompt``, ``2 prompts``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class Progress:
    """Shows how far a stage is: a bar on a terminal, elsewhere a line every 30 s.

    Parameters
    ----------
    command : str
        Named in each line.
    bars : bool
        Whether to draw bars.
    """

    def __init__(self, command: str, *, bars: bool) -> None:
        self._command, self._bars = command, bars
        self._stage, self._task = "", None
        self._display: Any = None
        self._started = self._logged = time.monotonic()
        self._first = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done; a total of 0 means unknown."""
        if stage != self._stage:
            self._stage, self._task = stage, None
            # What was done before the first report does not count for the rate.
            self._started, self._first = time.monotonic(), done
        if self._bars:
            self._draw(stage, done, total)
        elif time.monotonic() - self._logged >= EVERY:
            self._logged = time.monotonic()
            print(f"ensemble-rm {self._command}: {self._line(done, total)}", file=sys.stderr)

    def _line(self, done: int, total: int) -> str:
        text = f"{self._stage}: {done}" + (f" of {total}" if total else "")
        rate = self._rate(done)
        text += f", {rate:.3g}/s" if rate > 0 else ""
        if total and rate > 0:
            text += f", {(total - done) / rate:.0f} s left"
        return text

    def _rate(self, done: int) -> float:
        elapsed = time.monotonic() - self._started
        return (done - self._first) / elapsed if elapsed > 0 else 0.0

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._display is None:
            # Imported when a bar is drawn: most runs, and --help, draw none.
            from rich.console import Console as Terminal
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress as Display,
                TextColumn,
                TimeRemainingColumn,
            )

            self._display = Display(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Terminal(stderr=True),
                transient=True,
            )
            self._display.start()
        if self._task is None:
            # One bar at a time: a finished stage's bar would stay and hide the present one's rate.
            for task in self._display.task_ids:
                self._display.remove_task(task)
            self._task = self._display.add_task(stage, total=total or None, rate="")
        rate = self._rate(done)
        text = f"{rate:.3g}/s" if rate > 0 else ""
        self._display.update(self._task, completed=done, total=total or None, rate=text)


class Console:
    """Prints a command's result on standard output, and all else on standard error.

    Parameters
    ----------
    command : str
        As it was typed, such as ``versions list``.
    json : bool
        Whether the result is one JSON object, and nothing follows it.
    """

    def __init__(self, command: str, *, json: bool) -> None:
        self.command, self.json = command, json
        self.saved: Path | None = None
        self._lines: list[tuple[str, str]] = []

    def progress(self) -> Progress:
        """Return a progress callback, as a context manager."""
        return Progress(self.command, bars=sys.stderr.isatty() and not self.json)

    def note(self, text: str) -> None:
        """Print a remark."""
        print(text, file=sys.stderr)

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """Print the result: one JSON object with --json, else the text."""
        # Standard output has the result alone, so that it can be piped.
        print(json.dumps(data, ensure_ascii=False) if self.json else text)

    def read(self, what: str) -> None:
        """Add a "read" line to the final summary."""
        self._lines.append(("read", what))

    def cut(self, counts: Mapping[str, int]) -> None:
        """Add a line on truncated samples to the final summary.

        Parameters
        ----------
        counts : mapping of str to int
            ``prompts_cut`` and ``completions_cut``, as `Truncation.to_json` counts them.
        """
        prompts, completions = counts["prompts_cut"], counts["completions_cut"]
        self._lines.append(
            ("cut", f"{counted(prompts, 'prompt')}, {counted(completions, 'completion')}")
        )

    def left_out(self, what: str) -> None:
        """Add a line on rows that were not used to the final summary."""
        self._lines.append(("left out", what))

    def save(self, path: Path, *, config: bool = True) -> None:
        """Add the path of the result to the final summary.

        Parameters
        ----------
        path : Path
        config : bool
            Whether to write the options to a file next to it.
        """
        if config:
            self.saved = path
        self._lines.append(("saved", str(path)))

    def next(self, command: str) -> None:
        """Add a suggested next command to the final summary."""
        self._lines.append(("next", command))

    def finish(self, config: Path | None) -> None:
        """Print the final summary."""
        if self.json:
            return
        # The order is the reader's, not that in which a command reports.
        order = ("read", "cut", "left out", "saved", "config", "next")
        lines = [*self._lines, *([] if config is None else [("config", str(config))])]
        for label, text in sorted(lines, key=lambda line: order.index(line[0])):
            print(f"{label + ':':9s} {text}", file=sys.stderr)
