"""The demo's run: train, calibrate, evaluate; where the truth is known, hold against it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm.data.samples import Preferences
from ensemble_rm.demo.data import packaged_backbone, truth_of
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.evaluation.evaluation import Evaluation, evaluate
from ensemble_rm.evaluation.report import draw_evaluation, evaluation_text
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.metrics import nll
from ensemble_rm.progress import Progress, silent
from ensemble_rm.training.run import train

SHARES = (0.55, 0.1, 0.15, 0.2)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    ensemble : Path
    pictures : tuple of Path
    evaluation : Evaluation
    example : dict
        One test pair with its verdict.
    against_truth : dict of str to float
        Empty where the truth is not known.
    seconds : float
    simulated : bool
        Whether the judgments are the simulated annotator's.
    """

    ensemble: Path
    pictures: tuple[Path, ...]
    evaluation: Evaluation
    example: dict[str, Any]
    against_truth: dict[str, float]
    seconds: float
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "simulated_annotator": self.simulated,
            "ensemble": str(self.ensemble),
            "pictures": [str(path) for path in self.pictures],
            "seconds": self.seconds,
            "example": self.example,
            "against_truth": self.against_truth,
            "evaluation": self.evaluation.to_json(),
        }

    def text(self) -> str:
        """Return the result for a person."""
        lines = [evaluation_text(self.evaluation), ""]
        if self.simulated:
            t = self.against_truth
            before, after = f"{t['distance_before']:.3f}", f"{t['distance_after']:.3f}"
            own, best, coin = t["nll_after"], t["nll_of_the_truth"], float(np.log(2))
            lines += [
                "The judgments are a simulated annotator's, so the truth is known:",
                f"  mean distance to the true probability: {before} raw, {after} calibrated",
                f"  NLL: {own:.3f}; of the annotator itself {best:.3f}, of a coin {coin:.3f}",
                "",
            ]
        shown = self.example
        lines += [
            f"One pair: {shown['prompt']!r}",
            f"  first:  {shown['first']!r}",
            f"  second: {shown['second']!r}",
            f"  P(first is preferred) = {shown['probability']:.2f}"
            + (f" (true: {shown['true_probability']:.2f})" if self.simulated else ""),
            "",
            f"the ensemble: {self.ensemble}",
            *(f"a picture: {path}" for path in self.pictures),
            f"{self.seconds:.0f} s",
        ]
        return "\n".join(lines)


def run_demo(
    pairs: Preferences,
    *,
    out: Path,
    backbone: str | Path | None = None,
    members: int = 5,
    seed: int = 0,
    simulated: bool,
    progress: Progress = silent,
) -> DemoResult:
    """Run the demo.

    Parameters
    ----------
    pairs : Preferences
    out : Path
        Folder of the ensemble and the pictures.
    backbone : str or Path, optional
        The packaged MiniLM-L6 where not given.
    members, seed : int
    simulated : bool
        Whether the pairs are the demo's own, whose truth is known.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    DemoResult
    """
    began = time.monotonic()
    fit, validation, held, test = pairs.split(*SHARES, seed=seed)
    trained = train(
        fit,
        validation,
        backbone=backbone or packaged_backbone(),
        members=members,
        seed=seed,
        options=TrunkOptions(max_length=256),
        cache_dir=out / "cache",
        progress=progress,
    )
    ensemble = trained.calibrate(held.shuffled_sides(seed=seed), progress=progress)
    folder = ensemble.save_pretrained(out / "ensemble")
    ensemble = RewardEnsemble.from_pretrained(folder, backbone=backbone, cache_dir=out / "cache")
    evaluation = evaluate(ensemble, test, seed=seed, progress=progress)
    shuffled = test.shuffled_sides(seed=seed)
    example = _example(evaluation, shuffled)
    against: dict[str, float] = {}
    if simulated:
        truth = truth_of([pair.id for pair in shuffled], shuffled.targets)
        p = evaluation.probability
        raw = 1 / (1 + ((1 - p) / p) ** _temperature(ensemble))
        against = {
            "distance_before": float(np.abs(raw - truth).mean()),
            "distance_after": float(np.abs(p - truth).mean()),
            "nll_after": nll(p, shuffled.targets),
            "nll_of_the_truth": nll(truth, shuffled.targets),
        }
        example["true_probability"] = float(truth[example.pop("row")])
    example.pop("row", None)
    return DemoResult(
        folder,
        draw_evaluation(evaluation, out),
        evaluation,
        example,
        against,
        time.monotonic() - began,
        simulated,
    )


def _temperature(ensemble: RewardEnsemble) -> float:
    assert ensemble.calibration is not None
    return ensemble.calibration.temperature


def _example(evaluation: Evaluation, pairs: Preferences) -> dict[str, Any]:
    """Return the pair of which the ensemble is surest."""
    row = int(np.argmax(np.abs(evaluation.probability - 0.5)))
    pair = pairs[row]
    asked = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].content
    return {
        "row": row,
        "prompt": asked[-200:],
        "first": pair.chosen[:200],
        "second": pair.rejected[:200],
        "probability": float(evaluation.probability[row]),
    }
