"""The picture of `overoptimisation_lm.py`: gold against √KL, noisy labels and clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overoptimisation.curve_figures import Curves
from ensemble_rm.best_of_n import best_of_n_kl

# Okabe and Ito's colours, which stay apart for colour-blind eyes; a family of arms has one.
GREY, BLUE, SKY = "#5f6b76", "#0072b2", "#56b4e9"
GREEN, VERMILION, PURPLE = "#009e73", "#d55e00", "#a6558c"
SHOWN: dict[str, tuple[str, str, str]] = {
    "single": ("one head, last layer", GREY, "-"),
    "heads_uwo": ("five heads, last layer, UWO", BLUE, "-"),
    "middle_uwo": ("five heads, a middle layer, UWO", SKY, "-"),
    "views_mean": ("five views, mean", VERMILION, "--"),
    "views_uwo": ("five views, UWO", VERMILION, "-"),
    "branch_uwo": ("five branches, UWO", GREEN, "-"),
    "mixed_uwo": ("views of two backbones, UWO", PURPLE, "-"),
}
TITLES = {"noise": "A quarter of the labels flipped", "clean": "Clean labels"}
BANDS = ("single", "views_uwo")


def picture(measured: Mapping[str, Curves], sizes: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    root = np.sqrt(best_of_n_kl(sizes))
    for axes, (case, title) in zip(panels, TITLES.items(), strict=True):
        curves = measured[case]
        arms = [arm for arm in SHOWN if arm in curves.gold]
        for arm in arms:
            _, colour, line = SHOWN[arm]
            axes.plot(root, curves.gold[arm].mean(axis=0), line, color=colour, lw=2)
            if arm in BANDS:
                found = [curves.at(arm, i) for i in range(len(sizes))]
                low, high = [f.low for f in found], [f.high for f in found]
                axes.fill_between(root, low, high, color=colour, alpha=0.12, lw=0)
        _name(axes, curves, arms, float(root[-1]))
        axes.plot([0, root[-1]], [0, 0], color="#d9e2ec", lw=1, zorder=0)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("√KL of best-of-n (nats), at most")
        axes.set_xlim(0, root[-1] * 1.62)
        axes.set_xticks(np.arange(0, root[-1], 0.5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines["bottom"].set_bounds(0, root[-1])
        _say_n(axes, root, sizes)
    panels[0].set_ylabel(
        "gold of the chosen completion,\nstandard deviations of a prompt's samples"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _say_n(axes: Any, root: np.ndarray, sizes: list[int]) -> None:
    top = axes.secondary_xaxis("top")
    shown = [i for i, n in enumerate(sizes) if n in (1, 4, 16, 64, 256, 1024)]
    top.set_xticks(root[shown], [f"{sizes[i]:,}" for i in shown], fontsize=8, color="#7f8c8d")
    top.tick_params(length=2, color="#7f8c8d", pad=1)
    top.spines["top"].set_visible(False)
    axes.text(root[-1] * 1.03, 1.02, "n", transform=axes.get_xaxis_transform(), fontsize=8)


def _name(axes: Any, curves: Curves, arms: list[str], end: float) -> None:
    """Write each arm's name at its curve's end, moved apart where they would overlap."""
    ends = {arm: float(curves.gold[arm].mean(axis=0)[-1]) for arm in arms}
    places = apart([ends[arm] for arm in arms], 0.1)
    for arm, place in zip(arms, places, strict=True):
        label, colour, _ = SHOWN[arm]
        axes.plot([end, end * 1.03], [ends[arm], place], color=colour, lw=0.8, clip_on=False)
        axes.text(end * 1.04, place, label, color=colour, fontsize=9, va="center")


def apart(heights: list[float], gap: float) -> list[float]:
    """Return heights at least `gap` from one another, in their order, moved as a whole about them.

    Neighbours that would overlap become one group, centred on their mean.
    """
    order = np.argsort(heights)
    groups: list[list[float]] = []
    for height in np.array(heights)[order]:
        groups.append([float(height)])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    flat = [_bottom(group, gap) + gap * i for group in groups for i in range(len(group))]
    found = np.empty(len(heights))
    found[order] = flat
    return [float(x) for x in found]


def _bottom(group: list[float], gap: float) -> float:
    return float(np.mean(group)) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return float(np.mean(group)) + gap * (len(group) - 1) / 2
