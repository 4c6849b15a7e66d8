"""Draws the diagrams of the documentation: ``python docs/images/make_diagrams.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, GREY = "#2a6f97", "#d9822b", "#3a7d44", "#b23a48", "#6b7280"
PALE = {BLUE: "#e3eef5", ORANGE: "#fbeedd", GREEN: "#e4f1e6", RED: "#f8e3e6", GREY: "#eef0f2"}


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure whose axes count in inches, without ticks."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, w: float, h: float, text: str, color: str = GREY) -> None:
    """Draw a box around a text; (x, y) is its lower left corner."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=PALE[color], ec=color, lw=1.2))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9, color="#1f2933")


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.2})


def note(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write a small grey text."""
    options = {"ha": "center", "va": "center", "fontsize": 8, "color": GREY} | options
    axes.text(x, y, text, **options)


def save(figure: Any, name: str) -> None:
    """Write the picture; the same picture is the same file."""
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def pipeline() -> None:
    """From samples and judgments to a reward and a probability."""
    figure, axes = canvas(9.4, 3.0)
    box(axes, 0.1, 2.15, 1.5, 0.65, "preference pairs", GREY)
    box(axes, 0.1, 0.95, 1.5, 0.65, "samples\n(prompt, completion)", GREY)
    for i, name in enumerate(("member 1", "member 2", "member k")):
        box(axes, 2.2, 0.65 + 0.47 * i, 1.1, 0.38, name, BLUE)
    arrow(axes, (1.6, 2.45), (2.75, 1.99))
    note(axes, 2.3, 2.38, "train", ha="left")
    arrow(axes, (1.6, 1.27), (2.2, 1.31))
    box(axes, 3.9, 0.95, 1.15, 0.65, "normaliser\noffset, scale", BLUE)
    arrow(axes, (3.3, 1.31), (3.9, 1.29))
    note(axes, 3.6, 0.45, "scores (n, k)")
    box(axes, 5.6, 0.95, 1.25, 0.65, "aggregator\nmean, LCB, …", ORANGE)
    arrow(axes, (5.05, 1.27), (5.6, 1.27))
    box(axes, 7.4, 0.95, 1.9, 0.65, "reward (n,)\nfor an RL loop", GREEN)
    arrow(axes, (6.85, 1.27), (7.4, 1.27))
    box(axes, 5.6, 2.15, 1.25, 0.65, "human\njudgments", GREY)
    box(axes, 7.4, 2.15, 1.9, 0.65, "temperature T\nP(first) = σ(margin / T)", GREEN)
    arrow(axes, (6.85, 2.47), (7.4, 2.47))
    note(axes, 7.12, 2.62, "fit")
    arrow(axes, (8.35, 1.6), (8.35, 2.15))
    note(axes, 8.28, 1.87, "two rewards give a margin", ha="right")
    note(axes, 6.22, 0.5, "the members' disagreement\nis the uncertainty")
    save(figure, "pipeline")


def views() -> None:
    """One pass of a frozen trunk, read by several heads at different layers."""
    figure, axes = canvas(7.2, 3.6)
    layers = 8
    for i in range(layers):
        read = i in (3, 5, 7)
        box(axes, 0.4 + 0.2, 0.35 + 0.38 * i, 2.2, 0.3, f"layer {i + 1}", BLUE if read else GREY)
    note(axes, 1.7, 0.15, "tokens of prompt and completion")
    note(axes, 1.7, 3.47, "trunk: frozen, one pass per sample")
    rows = (
        (3, "view 4:both", "head 1"),
        (5, "view 6:both", "head 2"),
        (7, "view 8:both", "head 3"),
    )
    for i, view, head in rows:
        y = 0.35 + 0.38 * i
        arrow(axes, (2.8, y + 0.15), (3.5, y + 0.15))
        box(axes, 3.5, y - 0.06, 1.25, 0.42, view, ORANGE)
        arrow(axes, (4.75, y + 0.15), (5.3, y + 0.15))
        box(axes, 5.3, y - 0.06, 0.8, 0.42, head, GREEN)
        note(axes, 6.2, y + 0.15, "score", ha="left")
    note(
        axes,
        4.9,
        0.55,
        "a view is a layer and a pooling:\nlast token, mean of the completion, or both",
    )
    save(figure, "views")


def kinds() -> None:
    """Draw what each kind of member shares and what it trains."""
    figure, axes = canvas(8.6, 3.0)
    plans = (
        ("heads", 6, "k heads,\none shared trunk"),
        ("branches", 4, "k copies of the\ntop m blocks"),
        ("lora", 6, "k adapters on\nshared blocks"),
        ("full", 0, "k whole models"),
    )
    for column, (name, shared, text) in enumerate(plans):
        x = 0.3 + 2.1 * column
        note(axes, x + 0.75, 2.85, name, fontsize=10, color="#1f2933")
        if shared:
            box(axes, x, 0.7, 1.5, 0.25 * shared, "frozen", GREY)
        bottom = 0.7 + 0.25 * shared
        top = {"branches": bottom + 0.58, "full": 2.54}.get(name, bottom + 0.04)
        for member in range(3):
            left = x + 0.52 * member
            if name == "full":
                box(axes, left, 0.7, 0.46, 1.8, "", BLUE)
            elif name == "branches":
                box(axes, left, bottom + 0.04, 0.46, 0.5, "", BLUE)
            elif name == "lora":
                box(axes, left + 0.3, 0.75, 0.1, 1.4, "", ORANGE)
            box(axes, left, top, 0.46, 0.14, "", GREEN)
        note(axes, x + 0.75, 0.35, text)
    save(figure, "member_kinds")


def aggregators() -> None:
    """Draw the same five scores under each aggregator."""
    figure, axes = plt.subplots(figsize=(7.2, 2.7), layout="constrained")
    calm, wild = np.array([0.8, 0.9, 1.0, 1.1, 1.2]), np.array([-0.6, 0.3, 1.4, 1.9, 2.2])
    for y, scores, name in ((1.0, calm, "members agree"), (0.0, wild, "members disagree")):
        axes.scatter(scores, np.full(5, y), s=45, color=BLUE, zorder=3)
        marks = (
            ("mean", scores.mean(), GREEN, 0.16),
            ("LCB κ=1", scores.mean() - scores.std(), ORANGE, 0.16),
            ("minimum", scores.min(), RED, -0.28),
        )
        for label, value, color, dy in marks:
            axes.plot([value, value], [y - 0.1, y + 0.1], color=color, lw=2.5, zorder=2)
            if y == 0.0:
                axes.text(value, y + dy, label, ha="center", fontsize=8, color=color)
        axes.text(-1.05, y, name, va="center", ha="right", fontsize=9)
    axes.set(yticks=[], ylim=(-0.55, 1.5), xlim=(-1, 2.5), xlabel="score, normalised units")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    save(figure, "aggregators")


def temperature() -> None:
    """Draw the probability that a margin means, by temperature."""
    figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    margins = np.linspace(-6, 6, 200)
    for value, color, label in (
        (0.5, RED, "T = 0.5: votes follow the reward closely"),
        (1.5, GREEN, "T = 1.5"),
        (5.0, BLUE, "T = 5: votes are noisy"),
    ):
        axes.plot(margins, 1 / (1 + np.exp(-margins / value)), color=color, label=label)
    axes.set(xlabel="margin = reward(first) − reward(second)", ylabel="P(first is preferred)")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save(figure, "temperature")


def drift() -> None:
    """Where three kinds of drift act."""
    figure, axes = canvas(8.6, 2.4)
    box(axes, 0.2, 1.5, 1.5, 0.6, "policy writes\ncompletions", GREY)
    box(axes, 2.6, 1.5, 1.5, 0.6, "members score\nthem", BLUE)
    box(axes, 5.0, 1.5, 1.5, 0.6, "temperature:\nprobability", GREEN)
    box(axes, 6.9, 0.55, 1.3, 0.6, "annotators\njudge pairs", ORANGE)
    arrow(axes, (1.7, 1.8), (2.6, 1.8))
    arrow(axes, (4.1, 1.8), (5.0, 1.8))
    arrow(axes, (6.9, 1.0), (6.3, 1.5))
    note(axes, 3.35, 0.95, "unlabelled drift:\ndo scores look as they did?", color=BLUE)
    note(axes, 5.4, 0.95, "labelled drift:\ndoes T still fit?", color=GREEN)
    note(axes, 7.5, 0.25, "rater drift:\ndo they judge as before?", color=ORANGE)
    save(figure, "drift")


if __name__ == "__main__":
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "ensemble_rm", "font.size": 9}
    for draw in (pipeline, views, kinds, aggregators, temperature, drift):
        draw()
