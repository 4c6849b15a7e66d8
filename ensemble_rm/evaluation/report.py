"""An evaluation as a table for a terminal and as PNG pictures: reliability and risk–coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ensemble_rm.evaluation.evaluation import Evaluation, Row, SubsetRow
from ensemble_rm.metrics import Interval, risk_coverage
from ensemble_rm.plotting import INK, MUTED, PALE, new_figure, write_figure
from ensemble_rm.text_table import table


def _figure(metrics: dict[str, Interval], name: str) -> str:
    if name not in metrics:
        return "—"
    i = metrics[name]
    return f"{i.estimate:.3f} [{i.low:.3f}, {i.high:.3f}]"


def _short(metrics: dict[str, Interval], name: str) -> str:
    return f"{metrics[name].estimate:.3f}" if name in metrics else "—"


def _line(row: Row, chosen: str) -> list[str]:
    return [
        ("▸ " if row.name == chosen else "  ") + row.name,
        _figure(row.before, "accuracy"),
        _short(row.before, "nll"),
        _figure(row.after, "nll"),
        _short(row.before, "ece"),
        _short(row.after, "ece"),
        "—" if row.null_after is None else f"≤ {row.null_after.upper95:.3f}",
        _short(row.after, "brier"),
        "—" if row.temperature is None else f"{row.temperature.temperature:.2f}",
    ]


def _subset_line(row: SubsetRow) -> list[str]:
    return [
        "  " + row.name,
        str(row.pairs),
        _figure(row.metrics, "accuracy"),
        _figure(row.metrics, "nll"),
        _short(row.metrics, "ece"),
        f"≤ {row.null.upper95:.3f}",
        "—" if row.temperature is None else f"{row.temperature:.2f}",
    ]


def evaluation_text(evaluation: Evaluation) -> str:
    """Return the evaluation as a table, followed by notes on its columns.

    Parameters
    ----------
    evaluation : Evaluation
        Evaluation to show.

    Returns
    -------
    str
        Several lines.
    """
    header = ("", "accuracy", "NLL raw", "NLL", "ECE raw", "ECE", "by chance", "Brier", "T")
    parts = [table(header, [_line(row, evaluation.chosen) for row in evaluation.rows])]
    if evaluation.subsets:
        columns = ("▸ by subset", "pairs", "accuracy", "NLL", "ECE", "by chance", "T")
        parts += ["", table(columns, [_subset_line(row) for row in evaluation.subsets])]
    notes = [
        f"{evaluation.pairs} pairs of {evaluation.prompts} prompts; brackets: 95 % over prompts.",
        "raw: σ(Δ) of normalised scores; others: σ(Δ/T), T fitted on the calibration's judgments.",
        "by chance: 95 % of perfectly calibrated models with these probabilities stay below.",
        "▸ is the ensemble's own aggregator, under its own calibration.",
        "accuracy, NLL and Brier use the pairs' weights; the ECE counts each pair once.",
    ]
    if evaluation.pooling_gain is not None:
        gain = evaluation.pooling_gain
        notes.append(
            f"pooling gain: {gain.estimate:.4f} [{gain.low:.4f}, {gain.high:.4f}] nats, the mean "
            "member's NLL − the ensemble's, each at its own T"
        )
    for name, area in evaluation.error_auroc.items():
        notes.append(
            f"AUROC of errors by {name}: {area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]"
        )
    if evaluation.margin_correlation is not None:
        notes.append(f"mean correlation of members' margins: {evaluation.margin_correlation:.2f}")
    if evaluation.longer_first_auroc is not None:
        notes.append(f"AUROC of length alone: {evaluation.longer_first_auroc:.3f}")
    if evaluation.unrewarded:
        notes.append(
            f"{evaluation.unrewarded} further pairs have no reward: too few members scored them"
        )
    notes += [
        f"{row.name} scored {evaluation.pairs - row.missing} of the pairs; its metrics are of those"
        for row in evaluation.rows
        if row.missing
    ]
    refused = {row.refusal for row in evaluation.rows if row.refusal}
    notes += [f"not calibrated: {reason}" for reason in sorted(refused)]
    return "\n".join([*parts, "", *notes])


def draw_reliability(
    p: ArrayLike, y: ArrayLike, path: Path, *, bins: int = 10, title: str = "Reliability"
) -> Path:
    """Plot the observed share of wins against the predicted probability.

    Parameters
    ----------
    p, y : array_like, shape (n_pairs,)
        Probabilities and verdicts; each pair counts in both orientations.
    path : Path
        PNG file to write.
    bins : int
        Number of bins of equal mass.
    title : str
        Title of the plot.

    Returns
    -------
    Path
        As given.
    """
    q, t = np.asarray(p, dtype=np.float64), np.asarray(y, dtype=np.float64)
    # Both orientations, so that the curve does not depend on which side is named first.
    q, t = np.concatenate([q, 1 - q]), np.concatenate([t, 1 - t])
    order = np.argsort(q, kind="stable")
    # Bins of equal counts: margins crowd around ½, and bins of equal width would be empty.
    parts = np.array_split(order, bins)
    predicted = np.array([q[i].mean() for i in parts])
    observed = np.array([t[i].mean() for i in parts])
    # A pair's orientations fall into mirrored bins, so that each bin counts a pair once.
    counts = np.array([len(i) for i in parts])
    # Binomial error of a perfectly calibrated model, at the bin's mean probability.
    error = 1.96 * np.sqrt(np.maximum(predicted * (1 - predicted), 1e-9) / counts)
    figure, axes = new_figure(title, "predicted probability", "observed share of wins", size=(5, 5))
    grid = np.linspace(0, 1, 101)
    axes.plot(grid, grid, color=MUTED, lw=1, ls="--", label="perfect")
    axes.fill_between(
        predicted, predicted - error, predicted + error, color=PALE, label="95 % of perfect models"
    )
    axes.plot(predicted, observed, "o-", color=INK, ms=5, lw=1.5, label="observed")
    axes.hist(q, bins=40, range=(0, 1), weights=np.full(len(q), 0.5 / len(q)), color=PALE)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="upper left")
    return write_figure(figure, path)


def draw_risk_coverage(evaluation: Evaluation, path: Path) -> Path:
    """Plot the error rate among the most certain pairs, for each uncertainty.

    Parameters
    ----------
    evaluation : Evaluation
        Evaluation to show.
    path : Path
        PNG file to write.

    Returns
    -------
    Path
        As given.
    """
    figure, axes = new_figure(
        "Risk and coverage", "share of pairs kept, most certain first", "errors", size=(6, 4)
    )
    for colour, (name, doubt) in zip(
        (INK, MUTED, "#7f8c8d"), evaluation.uncertainty.items(), strict=False
    ):
        coverage, risk = risk_coverage(evaluation.probability, evaluation.targets, -doubt)
        # The error rate among the first few pairs is noise, and would set the axis.
        shown = coverage >= min(0.05, 20 / len(coverage))
        axes.plot(coverage[shown], risk[shown], color=colour, lw=1.5, label=f"by {name}")
    _, risk = risk_coverage(evaluation.probability, evaluation.targets, -doubt)
    axes.axhline(risk[-1], color=PALE, lw=1, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return write_figure(figure, path)


def draw_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Path, ...]:
    """Write every plot of an evaluation.

    Parameters
    ----------
    evaluation : Evaluation
        Evaluation to show.
    folder : Path
        Created where missing.

    Returns
    -------
    tuple of Path
        The PNG files.
    """
    title = f"Reliability of {evaluation.chosen} on {evaluation.pairs} pairs"
    return (
        draw_reliability(
            evaluation.probability, evaluation.targets, folder / "reliability.png", title=title
        ),
        draw_risk_coverage(evaluation, folder / "risk_coverage.png"),
    )
