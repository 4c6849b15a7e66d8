"""Rows of `grpo.py`'s runs → figures and the picture. Knows numbers; knows nothing of models.

Prompts differ from step to step by more than policies do: gold and proxy are gains over what the
policy of the beginning got for a step's own prompts. What an arm is said to have at the end is the
mean over the last tenth of its steps; its peak is the highest such mean along the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.common import Figures

# Okabe and Ito's colours, as in `lm_picture.py`.
SHOWN = {
    "single": ("one head", "#5f6b76"),
    "views_mean": ("five views, mean", "#0072b2"),
    "views_uwo": ("five views, UWO", "#d55e00"),
}
LINES = ("-", "--", ":")  # of each β, from the lowest
PANELS = {
    "gold": "gold, gain over the beginning\n(std of a prompt's samples)",
    "proxy": "proxy, gain over the beginning\n(normalised units)",
    "kl": "KL, nats a completion",
    "length": "characters a completion\n(geometric mean)",
    "std": "members' std (normalised units)",
}


@dataclass(frozen=True)
class Course:
    """One run, step by step; NaN where a figure was not measured or has no meaning.

    Attributes
    ----------
    arm : str
    beta : float
    seed : int
    steps : ndarray, shape (n_steps,)
    values : dict of str to ndarray, shape (n_steps,)
        By the names of `PANELS`.
    seconds : float
        Of the processor, a step.
    """

    arm: str
    beta: float
    seed: int
    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    seconds: float

    @classmethod
    def of(
        cls,
        arm: str,
        beta: float,
        seed: int,
        rows: Sequence[Mapping[str, Any]],
        *,
        start: Mapping[str, Sequence[float]],
        unit: float,
    ) -> Course:
        """Read a run's rows.

        Parameters
        ----------
        arm, beta, seed
            Whose they are.
        rows : sequence of dict
        start : mapping of str to sequence of float
            Of each step's prompts, the mean gold and the arm's mean reward before training.
        unit : float
            Standard deviation of gold within a prompt.
        """

        def column(name: str) -> np.ndarray:
            return np.array([np.nan if row[name] is None else row[name] for row in rows])

        steps = column("step").astype(int)
        before = {name: np.array(values)[steps - 1] for name, values in start.items()}
        values = {
            "gold": (column("gold") - before["gold"]) / unit,
            "proxy": column("reward") - before[arm],
            "kl": column("kl"),
            "length": np.exp(column("log_length")),
            "std": column("member_std"),
        }
        return cls(arm, beta, seed, steps, values, float(np.median(column("processor_seconds"))))

    @property
    def window(self) -> int:
        return max(len(self.steps) // 10, 1)

    def smooth(self, name: str) -> np.ndarray:
        """Average over a tenth of the steps up to each, shape (n_steps,)."""
        values = self.values[name]
        return np.array(
            [_mean(values[max(i + 1 - self.window, 0) : i + 1]) for i in range(len(values))]
        )

    def final(self, name: str) -> float:
        return _mean(self.values[name][-self.window :])

    def peak(self, name: str) -> float:
        return float(np.nanmax(self.smooth(name)[self.window - 1 :]))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def grouped(courses: Sequence[Course]) -> Iterator[tuple[str, float, list[Course]]]:
    """Yield each arm and β with its seeds."""
    for arm in SHOWN:
        for beta in sorted({course.beta for course in courses}):
            if own := [c for c in courses if (c.arm, c.beta) == (arm, beta)]:
                yield arm, beta, own


def report(figures: Figures, courses: Sequence[Course]) -> None:
    """Give each arm's figures over its seeds, and its gold less the single head's of that seed."""
    for arm, beta, own in grouped(courses):
        name = f"{arm}_beta{beta:g}"
        figures.add_repeats(f"gold_final_{name}", [c.final("gold") for c in own])
        figures.add_repeats(f"gold_peak_{name}", [c.peak("gold") for c in own])
        figures.add_repeats(f"gold_mean_{name}", [float(c.values["gold"].mean()) for c in own])
        drops = [c.peak("gold") - c.final("gold") for c in own]
        figures.add_repeats(f"gold_drop_{name}", drops)
        for what in ("proxy", "kl", "length", "std"):
            ends = [c.final(what) for c in own]
            if np.isfinite(ends).all():
                figures.add_repeats(f"{what}_final_{name}", ends)
        single = {c.seed: c for c in courses if (c.arm, c.beta) == ("single", beta)}
        gains = [c.final("gold") - single[c.seed].final("gold") for c in own if c.seed in single]
        if arm != "single" and gains:
            figures.add_repeats(f"gold_gain_{name}", gains)
    figures.add_repeats("seconds_per_step", [c.seconds for c in courses])


def picture(courses: Sequence[Course], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    betas = sorted({course.beta for course in courses})
    for axes, (name, title) in zip(panels, PANELS.items(), strict=False):
        for arm, beta, own in grouped(courses):
            colour, line = SHOWN[arm][1], LINES[betas.index(beta)]
            for course in own:
                axes.plot(course.steps, course.smooth(name), line, color=colour, lw=0.6, alpha=0.6)
            steps, middle = _middle(own, name)
            axes.plot(steps, middle, line, color=colour, lw=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
    _against_kl(panels[-1], courses, betas)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    for arm, (label, colour) in SHOWN.items():
        if any(course.arm == arm for course in courses):
            panels[0].plot([], [], color=colour, lw=2, label=label)
    for beta, line in zip(betas, LINES, strict=False):
        panels[0].plot([], [], line, color="#1b3a57", lw=1.4, label=f"β = {beta:g}")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _middle(own: Sequence[Course], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds, as far as the shortest of them has come."""
    n = min(len(course.steps) for course in own)
    return own[0].steps[:n], np.mean([course.smooth(name)[:n] for course in own], axis=0)


def _against_kl(axes: Any, courses: Sequence[Course], betas: Sequence[float]) -> None:
    for arm, beta, own in grouped(courses):
        _, kl = _middle(own, "kl")
        _, gold = _middle(own, "gold")
        root = np.sqrt(np.maximum(kl, 0))
        axes.plot(root, gold, LINES[betas.index(beta)], color=SHOWN[arm][1], lw=1.6)
    axes.set_title("gold against √KL", loc="left", fontsize=10)
    axes.set_xlabel("√KL (nats)")
