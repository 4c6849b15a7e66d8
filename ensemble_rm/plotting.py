"""Colours, axes and PNG files of the library's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_rm.errors import StorageError

INK, MUTED, PALE = "#1b3a57", "#c0392b", "#d9e2ec"


def new_figure(title: str, x: str, y: str, *, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG; raise `StorageError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error
    return path
