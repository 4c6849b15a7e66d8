"""A plot of an RL run as PNG: rewards and gold, spread, KL and length against steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import DataError
from ensemble_rm.plotting import INK, MUTED, write_figure

if TYPE_CHECKING:
    from ensemble_rm.rl.monitor.alarms import Alarm, StepRecord


def draw_run(
    records: Sequence[StepRecord],
    path: Path,
    *,
    alarms: Sequence[Alarm] = (),
    reference_std: float | None = None,
) -> Path:
    """Draw the records of a monitor.

    Parameters
    ----------
    records : sequence of StepRecord
        At least one.
    path : Path
        File to write.
    alarms : sequence of Alarm
        Marked at their steps.
    reference_std : float, optional
        Mean member std of the calibration's judgments.

    Returns
    -------
    Path
        The same path.

    Raises
    ------
    DataError
        If there are no records.
    """
    from matplotlib.figure import Figure

    if not records:
        raise DataError("no steps to draw; draw the records of a run that has started")
    figure = Figure(figsize=(10, 7), layout="constrained")
    first, second, third, fourth = figure.subplots(2, 2, sharex=True).ravel()
    _draw(first, records, lambda r: r.reward, "reward", INK)
    _draw(first, records, lambda r: r.length_controlled, "length-controlled", "#7f8c8d")
    _draw(first, records, lambda r: r.gold, "gold", "#2e8b57", marker="o")
    first.set_ylabel("reward, normalised units")
    _draw(second, records, lambda r: r.member_std, "members' std", INK)
    _draw(second, records, lambda r: r.disagreement, "disagreement", MUTED)
    if reference_std is not None:
        second.axhline(reference_std, color=INK, linestyle=":", label="std of the judgments")
    second.set_ylabel("spread of the members")
    _draw(third, records, lambda r: r.kl, "KL", INK, marker="o")
    third.set_ylabel("KL from the start, nats")
    _draw(fourth, records, lambda r: math.exp(r.log_length), "characters", INK)
    fourth.set_ylabel("length, geometric mean")
    for axes in (first, second, third, fourth):
        axes.spines[["top", "right"]].set_visible(False)
        for alarm in alarms:
            axes.axvline(alarm.step, color=MUTED, alpha=0.4, linewidth=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    for axes in (third, fourth):
        axes.set_xlabel("step")
    figure.suptitle("; ".join(f"{a.kind} at {a.step}" for a in alarms) or "No alarm", fontsize=10)
    return write_figure(figure, path)


def _draw(
    axes: Any,
    records: Sequence[StepRecord],
    value: Callable[[StepRecord], float],
    label: str,
    colour: str,
    *,
    marker: str | None = None,
) -> None:
    """Draw the steps at which a value is finite."""
    known = [(r.step, value(r)) for r in records if math.isfinite(value(r))]
    if known:
        steps, values = zip(*known, strict=True)
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
