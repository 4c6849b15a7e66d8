"""Best of n samples per prompt by an ensemble, and preference pairs for DPO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.data.samples import Prompt, Sample, prompt_json, prompt_key
from ensemble_rm.ensemble.results import Ranking
from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@dataclass(frozen=True, eq=False)
class Best:
    """The best of a prompt's completions.

    Attributes
    ----------
    completion : str
        The completion with the highest reward; the first of equals.
    index : int
        Its position among the prompt's completions.
    reward : float
        Its reward in normalised units.
    ranking : Ranking
        Ranking of all the prompt's completions.
    """

    completion: str
    index: int
    reward: float
    ranking: Ranking


def best_of_n(
    ensemble: RewardEnsemble,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    *,
    aggregator: Aggregator | None = None,
    references: Sequence[str | None] | None = None,
    progress: Progress = silent,
) -> list[Best]:
    """Choose each prompt's best completion by the ensemble's reward.

    Parameters
    ----------
    ensemble : RewardEnsemble
        A calibration is not needed: the order is the same at every temperature.
    prompts : sequence of str or of messages
    completions : sequence of sequence of str
        Completions of each prompt, at least one; their numbers may differ.
    aggregator : Aggregator, optional
        Aggregator of the reward (default: the ensemble's).
    references : sequence of (str or None), optional
        Reference completion of each prompt, which a normaliser with a baseline needs.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    list of Best
        One per prompt.

    Raises
    ------
    DataError
        If a prompt has no completion.
    """
    for row, texts in enumerate(completions):
        if len(texts) == 0:
            raise DataError(f"prompt {row} has no completion to choose from; leave it out")
    chosen = ensemble if aggregator is None else ensemble.with_aggregator(aggregator)
    rankings = chosen.rank(prompts, completions, references=references, progress=progress)
    best = []
    for texts, ranking in zip(completions, rankings, strict=True):
        index = int(ranking.order[0])
        best.append(Best(texts[index], index, float(ranking.reward[index]), ranking))
    return best


@dataclass(frozen=True)
class MadePair:
    """A pair of completions with a probability above the threshold.

    Attributes
    ----------
    prompt : str or tuple of Message
    chosen, rejected : str
    probability : float
        Calibrated P(chosen is preferred), at least the threshold.
    reward_chosen, reward_rejected : float
        In normalised units.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    probability: float
    reward_chosen: float
    reward_rejected: float

    def to_json(self, *, soft: bool = False) -> dict[str, Any]:
        """Return a row for TRL's DPOTrainer: text, or messages where the prompt has messages.

        Parameters
        ----------
        soft : bool
            Whether to add ``votes`` of p and 1 − p, which this library trains on as a soft label.
            TRL has no soft label per row; its ``label_smoothing`` is one number for all rows.
        """
        chat = not isinstance(self.prompt, str)

        def side(text: str) -> Any:
            return [{"role": "assistant", "content": text}] if chat else text

        row = {
            "prompt": prompt_json(self.prompt),
            "chosen": side(self.chosen),
            "rejected": side(self.rejected),
            "probability": self.probability,
            "reward_chosen": self.reward_chosen,
            "reward_rejected": self.reward_rejected,
        }
        return row | ({"votes": [self.probability, 1 - self.probability]} if soft else {})


def make_pairs(
    ensemble: RewardEnsemble,
    samples: Iterable[Sample],
    *,
    threshold: float = 0.8,
    per_prompt: int = 1,
    progress: Progress = silent,
) -> list[MadePair]:
    """Make DPO pairs from n samples per prompt, where the calibrated probability is high enough.

    Each prompt contributes up to `per_prompt` pairs of the largest margin, starting with best
    against worst. Equal completions count once. Picking the extremes of n samples also selects for
    the ensemble's errors: the probability is calibrated for pairs drawn as the judgments were, and
    becomes more optimistic as n grows. A conservative aggregator reduces that.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated for its own aggregator.
    samples : iterable of Sample
        In any order; samples are grouped by prompt.
    threshold : float
        Minimum P(chosen is preferred), in [½, 1).
    per_prompt : int
        Maximum number of pairs per prompt, ≥ 1.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    list of MadePair
        By prompt, in the order of the prompts' first samples.

    Raises
    ------
    NotCalibratedError, AggregatorMismatchError
        If the ensemble has no calibration for its aggregator.
    OptionError
        If `threshold` or `per_prompt` is out of range.
    """
    if not 0.5 <= threshold < 1:
        raise OptionError(f"threshold must lie in [0.5, 1), not {threshold!r}")
    if per_prompt < 1:
        raise OptionError(f"per_prompt must be at least 1, not {per_prompt!r}")
    calibration = require_calibration(ensemble.calibration, ensemble.aggregator)
    prompts: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        prompts.setdefault(prompt_key(sample.prompt), {}).setdefault(sample.completion, sample)
    groups = [[*by_text.values()] for by_text in prompts.values() if len(by_text) > 1]
    scored = [sample for group in groups for sample in group]
    reward = ensemble.score(scored, progress=progress).reward if scored else np.zeros(0)
    pairs, start = [], 0
    for group in groups:
        part = reward[start : start + len(group)]
        pairs += _most_probable(group, part, calibration, threshold, per_prompt)
        start += len(group)
    return pairs


def _most_probable(
    group: Sequence[Sample],
    reward: np.ndarray[Any, np.dtype[np.float64]],
    calibration: Calibration,
    threshold: float,
    per_prompt: int,
) -> list[MadePair]:
    order = np.argsort(-reward, kind="stable")
    i, j = np.triu_indices(len(group), 1)
    margins = reward[order[i]] - reward[order[j]]
    largest = np.argsort(-margins, kind="stable")[:per_prompt]
    p = calibration.probability(margins[largest])
    pairs = []
    for row, probability in zip(largest, p, strict=True):
        first, second = int(order[i[row]]), int(order[j[row]])
        # A tie prefers neither, whatever the threshold.
        if probability >= threshold and margins[row] > 0:
            pairs.append(
                MadePair(
                    group[first].prompt,
                    group[first].completion,
                    group[second].completion,
                    float(probability),
                    float(reward[first]),
                    float(reward[second]),
                )
            )
    return pairs
