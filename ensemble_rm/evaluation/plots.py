"""An evaluation as pictures: reliability and risk–coverage, as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ensemble_rm.evaluation.evaluation import Evaluation
from ensemble_rm.metrics import risk_coverage
from ensemble_rm.plotting import INK, MUTED, PALE, new_figure, write_figure


def draw_reliability(
    p: ArrayLike, y: ArrayLike, path: Path, *, bins: int = 10, title: str = "Reliability"
) -> Path:
    """Draw how often the first side won against how probable it was said to be.

    Parameters
    ----------
    p, y : array_like, shape (n_pairs,)
        Probabilities and verdicts; each pair counts in both orientations.
    path : Path
        Of the PNG.
    bins : int
        Of equal mass.
    title : str
        Above the picture.

    Returns
    -------
    Path
        As given.
    """
    q, t = np.asarray(p, dtype=np.float64), np.asarray(y, dtype=np.float64)
    q, t = np.concatenate([q, 1 - q]), np.concatenate([t, 1 - t])
    order = np.argsort(q, kind="stable")
    parts = np.array_split(order, bins)
    said = np.array([q[i].mean() for i in parts])
    seen = np.array([t[i].mean() for i in parts])
    # A pair's orientations fall into mirrored bins, so that each bin counts a pair once.
    counts = np.array([len(i) for i in parts])
    error = 1.96 * np.sqrt(np.maximum(said * (1 - said), 1e-9) / counts)
    figure, axes = new_figure(title, "probability said", "share of wins seen", size=(5, 5))
    grid = np.linspace(0, 1, 101)
    axes.plot(grid, grid, color=MUTED, lw=1, ls="--", label="perfect")
    axes.fill_between(said, said - error, said + error, color=PALE, label="95 % of perfect models")
    axes.plot(said, seen, "o-", color=INK, ms=5, lw=1.5, label="seen")
    axes.hist(q, bins=40, range=(0, 1), weights=np.full(len(q), 0.5 / len(q)), color=PALE)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="upper left")
    return write_figure(figure, path)


def draw_risk_coverage(evaluation: Evaluation, path: Path) -> Path:
    """Draw the share of errors among the surest pairs, for each measure of doubt.

    Parameters
    ----------
    evaluation : Evaluation
        To be shown.
    path : Path
        Of the PNG.

    Returns
    -------
    Path
        As given.
    """
    figure, axes = new_figure(
        "Risk and coverage", "share of pairs kept, the surest first", "errors", size=(6, 4)
    )
    for colour, (name, doubt) in zip(
        (INK, MUTED, "#7f8c8d"), evaluation.uncertainty.items(), strict=False
    ):
        coverage, risk = risk_coverage(evaluation.probability, evaluation.targets, -doubt)
        shown = coverage >= min(0.05, 20 / len(coverage))
        axes.plot(coverage[shown], risk[shown], color=colour, lw=1.5, label=f"by {name}")
    _, risk = risk_coverage(evaluation.probability, evaluation.targets, -doubt)
    axes.axhline(risk[-1], color=PALE, lw=1, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return write_figure(figure, path)


def draw_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Path, ...]:
    """Draw every picture of an evaluation.

    Parameters
    ----------
    evaluation : Evaluation
        To be shown.
    folder : Path
        Made where missing.

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
