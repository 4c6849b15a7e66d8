"""Drift reports as text for a terminal, and over time as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ensemble_rm.drift.labelled import LabelledDrift
from ensemble_rm.drift.raters import PANEL, RaterDrift
from ensemble_rm.drift.report import DriftReport
from ensemble_rm.drift.unlabelled import UnlabelledDrift
from ensemble_rm.errors import DataError
from ensemble_rm.plotting import INK, MUTED, PALE, write_figure
from ensemble_rm.text_table import table

_COLOURS = (INK, MUTED, "#7f8c8d", "#d68910")


def drift_text(report: DriftReport) -> str:
    """Return a report as text, one section per kind.

    Parameters
    ----------
    report : DriftReport

    Returns
    -------
    str
        Several lines.
    """
    sections = (
        ("labelled", report.labelled and _labelled_lines(report.labelled)),
        ("unlabelled", report.unlabelled and _unlabelled_lines(report.unlabelled)),
        ("raters", report.raters and _rater_lines(report.raters)),
    )
    lines = [f"drift at {report.at}: " + (", ".join(report.alarms) or "no alarm")]
    for name, section in sections:
        mark = "ALARM" if name in report.alarms else "no alarm"
        lines += ["", f"▸ {name}: {mark if section else 'unavailable'}"]
        lines += section or [f"  {report.unavailable.get(name, 'not requested')}"]
    return "\n".join(lines)


def _labelled_lines(result: LabelledDrift) -> list[str]:
    lines = [
        f"  null: T in [{result.low:.3f}, {result.high:.3f}]; {result.prompts} prompts",
        f"  e = {_e(result.log_e)}, maximum {_e(result.peak)}; alarm at {1 / result.alpha:.0f}",
        f"  P(any alarm over a life without drift) ≤ {result.promise:g}",
    ]
    if result.history:
        point = result.history[-1]
        left = [(point.again, "of prompts seen before"), (point.selected, "of selected pairs")]
        counts = ", ".join(f"{n} {what}" for n, what in left if n)
        lines += [f"  left out of the last batch: {counts}"] if counts else []
    if result.alarm:
        lines.append(
            f"  {result.direction} since {result.alarmed_at} ({result.alarmed_after} prompts): "
            "recalibrate on recent judgments"
        )
    return lines


def _e(log_e: float) -> str:
    return f"{math.exp(log_e):.3g}" if log_e < 700 else f"e^{log_e:.0f}"


def _unlabelled_lines(result: UnlabelledDrift) -> list[str]:
    header = ("  statistic", "then", "now", "effect", "distance", "p", "Holm")
    rows = [
        (
            ("▸ " if one.alarm else "  ") + one.name,
            f"{one.before:.3f}",
            f"{one.now:.3f}",
            f"{one.effect:+.3f}",
            f"{one.statistic:.3f}",
            f"{one.p:.4f}",
            f"{one.adjusted:.4f}",
        )
        for one in result.shifts
    ]
    lines = ["  " + line for line in table(header, rows).split("\n")]
    lines += [f"    {name}: unavailable, {why}" for name, why in result.unavailable.items()]
    lines.append(
        f"  {result.prompts} prompts; alarm at Holm ≤ {result.alpha / result.checks:.2g}, so that "
        f"P(any in {result.checks} checks) ≤ {result.alpha:g}; effect in the reference's std"
    )
    return lines


def _rater_lines(result: RaterDrift) -> list[str]:
    header = (f"  {result.month}", "votes", "agreed", "share", "first shown wins")
    rows = [
        (
            "  " + _name(cell.annotator),
            str(cell.votes),
            f"{cell.agreed}/{cell.compared}",
            _share(cell.agreement),
            _share(cell.first_share),
        )
        for cell in result.cells
        if cell.month == result.month
    ]
    lines = ["  " + line for line in table(header, rows).split("\n")]
    lines += [
        f"  ▸ {test.kind} of {_name(test.annotator)}: {test.before:.2f} → {test.now:.2f}, p "
        f"{test.p:.2g}, Holm {test.adjusted:.2g}"
        for test in result.tests
        if test.alarm
    ]
    lines.append(
        f"  {len(result.tests)} tests; alarm at Holm ≤ {result.alpha / result.checks:.2g}, so that "
        f"P(any in {result.checks} checks) ≤ {result.alpha:g}"
    )
    return lines


def _name(annotator: str) -> str:
    return "all" if annotator == PANEL else annotator


def _share(share: float) -> str:
    return "—" if math.isnan(share) else f"{share:.2f}"


def draw_drift(reports: Sequence[DriftReport], path: Path) -> Path:
    """Plot the three kinds over time, one below the other; filled markers are alarms.

    Parameters
    ----------
    reports : sequence of DriftReport
        All reports so far, in any order.
    path : Path
        Of the PNG.

    Returns
    -------
    Path
        As given.

    Raises
    ------
    DataError
        If there is no report.
    StorageError
        If the figure cannot be written.
    """
    from matplotlib.figure import Figure

    if not reports:
        raise DataError("no drift report to plot; run a check first")
    ordered = sorted(reports, key=lambda report: report.at)
    figure = Figure(figsize=(7, 8), layout="constrained")
    panels: tuple[tuple[str, str, Callable[[Any, Sequence[DriftReport]], bool]], ...] = (
        ("Labelled: does T still fit the verdicts?", "log e-value", _draw_labelled),
        ("Unlabelled: are scores distributed as before?", "effect", _draw_unlabelled),
        ("Raters: do humans judge as before?", "agreement", _draw_raters),
    )
    for axes, (title, label, draw) in zip(figure.subplots(3, 1), panels, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        if draw(axes, ordered):
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axes.text(0.5, 0.5, "unavailable", transform=axes.transAxes, ha="center", color=MUTED)
    return write_figure(figure, path)


def _ticks(axes: Any, labels: Sequence[str]) -> dict[str, int]:
    """Set evenly spaced tick labels on the axis; return the position of each label."""
    place = {label: i for i, label in enumerate(labels)}
    step = max(1, math.ceil(len(labels) / 8))
    axes.set_xticks(range(0, len(labels), step), list(labels)[::step], fontsize=8)
    return place


def _draw_labelled(axes: Any, reports: Sequence[DriftReport]) -> bool:
    # A version's test is identified by its null interval; its last report has all points.
    lives = {(one.low, one.high): one for report in reports if (one := report.labelled)}
    lives = {null: one for null, one in lives.items() if one.history}
    if not lives:
        return False
    place = _ticks(axes, sorted({point.at for one in lives.values() for point in one.history}))
    lines = (
        ("e-value", "log_e", INK),
        ("overconfident", "log_over", MUTED),
        ("underconfident", "log_under", _COLOURS[2]),
    )
    for i, one in enumerate(lives.values()):
        x = [place[point.at] for point in one.history]
        for label, name, colour in lines:
            y = [getattr(point, name) for point in one.history]
            axes.plot(x, y, color=colour, lw=1.5, label=None if i else label)
        if one.alarmed_at is not None:
            axes.plot(place[one.alarmed_at], -math.log(one.alpha), "o", color=MUTED)
        ends = (min(x) - 0.5, max(x) + 0.5)
        threshold = [-math.log(one.alpha)] * 2
        axes.plot(ends, threshold, color=MUTED, ls="--", lw=1, label=None if i else "alarm")
    return True


def _draw_unlabelled(axes: Any, reports: Sequence[DriftReport]) -> bool:
    past = [(report.at, one) for report in reports if (one := report.unlabelled)]
    names = list(dict.fromkeys(shift.name for _, one in past for shift in one.shifts))
    if not names:
        return False
    place = _ticks(axes, sorted({at for at, _ in past}))
    axes.axhline(0, color=PALE, lw=1)
    for name, colour in zip(names, _COLOURS, strict=False):
        result = [(place[at], s) for at, one in past for s in one.shifts if s.name == name]
        axes.plot(
            [x for x, _ in result], [s.effect for _, s in result], "o-", mfc="white", ms=4,
            color=colour, lw=1.5, label=name,
        )  # fmt: skip
        alarmed = [(x, s.effect) for x, s in result if s.alarm]
        if alarmed:
            axes.plot(*zip(*alarmed, strict=True), "o", color=colour, ms=6)
    return True


def _draw_raters(axes: Any, reports: Sequence[DriftReport]) -> bool:
    past = [one for report in reports if (one := report.raters)]
    cells = [cell for cell in past[-1].cells if cell.compared] if past else []
    if not cells:
        return False
    place = _ticks(axes, sorted({cell.month for cell in cells}))
    alarmed = {
        (test.annotator, one.month)
        for one in past
        for test in one.tests
        if test.alarm and test.kind == "agreement"
    }
    for annotator in sorted({cell.annotator for cell in cells}):
        own = [cell for cell in cells if cell.annotator == annotator]
        panel = annotator == PANEL
        x, y = [place[cell.month] for cell in own], [cell.agreement for cell in own]
        label = "all" if panel else None
        axes.plot(x, y, color=INK if panel else PALE, lw=2 if panel else 1, label=label)
        marked = [cell for cell in own if (annotator, cell.month) in alarmed]
        for cell in marked:
            axes.plot(place[cell.month], cell.agreement, "o", color=MUTED)
            where = (place[cell.month] + 0.03, cell.agreement)
            axes.annotate("" if panel else _name(annotator), where, fontsize=8)
    axes.set_ylim(0, 1)
    return True
