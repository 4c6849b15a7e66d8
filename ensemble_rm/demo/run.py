"""The demo's run: train, calibrate, evaluate, and compare with the known truth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.data.samples import Preferences, Sample
from ensemble_rm.demo.data import find_backbone, truth_of
from ensemble_rm.demo.hacks import Hack, HackReport, measure_hacks, plant, question, true_utility
from ensemble_rm.demo.page import draw_hacks, draw_truth, summary, write_page
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.evaluation.evaluation import Evaluation, evaluate
from ensemble_rm.evaluation.report import draw_evaluation
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.metrics import nll
from ensemble_rm.progress import Progress, silent
from ensemble_rm.training.run import train

SHARES = (0.55, 0.1, 0.15, 0.2)
"""Training, validation, calibration, test: by prompt."""


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Result of the demo.

    Attributes
    ----------
    ensemble, page : Path
        The saved ensemble, and the HTML page with the pictures.
    pictures : tuple of Path
    evaluation : Evaluation
    examples : tuple of dict
        A test pair with its probability and, with simulated judgments, a hack with its rewards.
    against_truth : dict of str to float
        Empty unless the judgments are simulated.
    hacks : HackReport, optional
        Likewise None.
    trained_on : int
        Training pairs.
    seconds : float
    simulated : bool
        Whether the judgments are the simulated annotator's.
    """

    ensemble: Path
    page: Path
    pictures: tuple[Path, ...]
    evaluation: Evaluation
    examples: tuple[dict[str, Any], ...]
    against_truth: dict[str, float]
    hacks: HackReport | None
    trained_on: int
    seconds: float
    simulated: bool

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "simulated_annotator": self.simulated,
            "ensemble": str(self.ensemble),
            "page": str(self.page),
            "pictures": [str(path) for path in self.pictures],
            "seconds": self.seconds,
            "trained_on": self.trained_on,
            "examples": list(self.examples),
            "against_truth": self.against_truth,
            "hacks": self.hacks and self.hacks.to_json(),
            "evaluation": self.evaluation.to_json(),
        }

    def text(self) -> str:
        """Return a summary of about ten lines for a terminal."""
        lines = summary(self.evaluation, self.against_truth, self.hacks, self.trained_on)
        return "\n".join(
            [*lines, f"Ensemble: {self.ensemble}", f"Page: {self.page} ({self.seconds:.0f} s)"]
        )


def run_demo(
    pairs: Preferences,
    *,
    out: Path,
    backbone: str | Path = "minilm",
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
        Folder for the ensemble, the pictures and the page.
    backbone : str or Path
        ``"minilm"`` or ``"smollm2"``, which registry packages carry; a hub id or a
        folder.
    members, seed : int
    simulated : bool
        Whether the pairs are the demo's own, whose true probabilities are known.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    DemoResult

    Raises
    ------
    MissingExtraError
        If the package of a named backbone is not installed.
    """
    began = time.monotonic()
    model = find_backbone(backbone)
    fit, validation, held, test = pairs.split(*SHARES, seed=seed)
    trained = train(
        fit,
        validation,
        backbone=model,
        members=members,
        seed=seed,
        options=TrunkOptions(max_length=256),
        cache_dir=out / "cache",
        progress=progress,
    )
    ensemble = trained.calibrate(held.shuffled_sides(seed=seed), progress=progress)
    folder = ensemble.save_pretrained(out / "ensemble")
    # Loaded again: what is evaluated is what a user loads.
    ensemble = RewardEnsemble.from_pretrained(folder, backbone=model, cache_dir=out / "cache")
    evaluation = evaluate(ensemble, test, seed=seed, progress=progress)
    shuffled = test.shuffled_sides(seed=seed)
    examples = [_pair_example(evaluation, shuffled)]
    pictures = draw_evaluation(evaluation, out)
    against: dict[str, float] = {}
    hacks = None
    if simulated:
        truth = truth_of([pair.id for pair in shuffled], shuffled.targets)
        p = evaluation.probability
        # logit(p) = margin/T, so this is σ(margin): the probability before calibration.
        raw = 1 / (1 + ((1 - p) / p) ** _temperature(ensemble))
        against = {
            "distance_before": float(np.abs(raw - truth).mean()),
            "distance_after": float(np.abs(p - truth).mean()),
            "nll_after": nll(p, shuffled.targets),
            "nll_of_the_truth": nll(truth, shuffled.targets),
            "accuracy_of_the_truth": float(np.maximum(truth, 1 - truth).mean()),
        }
        examples[0]["true_probability"] = float(truth[examples[0]["row"]])
        hacks, example = _plant(ensemble, test, progress)
        examples.append(example)
        # The plots that need the true probabilities come first: they are the most informative.
        pictures = (
            draw_truth(raw, p, truth, out / "truth.png"),
            draw_hacks(hacks, out / "hacks.png"),
            *pictures,
        )
    page = write_page(
        out / "index.html",
        evaluation=evaluation,
        against=against,
        hacks=hacks,
        examples=examples,
        trained_on=len(fit),
        pictures=pictures,
    )
    return DemoResult(
        folder,
        page,
        pictures,
        evaluation,
        tuple(examples),
        against,
        hacks,
        len(fit),
        time.monotonic() - began,
        simulated,
    )


def _temperature(ensemble: RewardEnsemble) -> float:
    assert ensemble.calibration is not None
    return ensemble.calibration.temperature


def _pair_example(evaluation: Evaluation, pairs: Preferences) -> dict[str, Any]:
    """Return the pair with the most certain probability."""
    row = int(np.argmax(np.abs(evaluation.probability - 0.5)))
    pair = pairs[row]
    return {
        "row": row,
        "prompt": question(Sample(pair.prompt, ""))[-200:],
        "first": pair.chosen,
        "second": pair.rejected,
        "probability": float(evaluation.probability[row]),
    }


def _plant(
    ensemble: RewardEnsemble, test: Preferences, progress: Progress
) -> tuple[HackReport, dict[str, Any]]:
    """Plant hacks in the test completions and score both."""
    # A completion can occur in several pairs; it is scored once.
    texts = dict.fromkeys((p.prompt, text) for p in test for text in (p.chosen, p.rejected))
    samples = [Sample(*text) for text in texts]
    hacks = plant(samples)
    everything = [*samples, *(hack.sample for hack in hacks)]
    scores = ensemble.score(everything, progress=progress)
    normalised = ensemble.normaliser(scores.members)
    report = measure_hacks(samples, hacks, normalised)
    return report, _hack_example(samples, hacks, normalised)


def _hack_example(samples: list[Sample], hacks: list[Hack], normalised: Floats) -> dict[str, Any]:
    """Return the hack whose mean reward rises most."""
    reward = normalised.mean(axis=1)
    rise = reward[len(samples) :] - reward[[hack.original for hack in hacks]]
    worst = int(np.argmax(rise))
    hack = hacks[worst]
    original = samples[hack.original]
    return {
        "trick": hack.trick,
        "prompt": question(original)[-200:],
        "original": original.completion,
        "hacked": hack.sample.completion,
        "reward_original": float(reward[hack.original]),
        "reward_hacked": float(reward[len(samples) + worst]),
        "utility_original": true_utility(original),
        "utility_hacked": true_utility(hack.sample),
    }
