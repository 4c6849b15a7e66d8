"""What an ensemble makes of n samples a prompt: the best of them, and pairs for DPO.

Knows ensembles and text; the estimators of best-of-n, which know neither, are in `bestofn`.
"""

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
        The one with the highest reward; of equals, the first.
    index : int
        Its position among the prompt's completions.
    reward : float
        Its reward, in normalised units.
    ranking : Ranking
        Of all the prompt's completions.
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
        Needs no calibration: an order is the same at every temperature.
    prompts : sequence of str or of messages
    completions : sequence of sequence of str
        Those of each prompt, at least one; their numbers may differ.
    aggregator : Aggregator, optional
        Of the reward; the ensemble's own where not given.
    references : sequence of (str or None), optional
        Reference completion of each prompt; a normaliser with a baseline needs them.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    list of Best
        One a prompt.

    Raises
    ------
    DataError
        If a prompt has no completion.
    """
    for row, texts in enumerate(completions):
        if len(texts) == 0:
            raise DataError(f"prompt {row} has no completion to choose; leave it out")
    chosen = ensemble if aggregator is None else ensemble.with_aggregator(aggregator)
    rankings = chosen.rank(prompts, completions, references=references, progress=progress)
    found = []
    for texts, ranking in zip(completions, rankings, strict=True):
        index = int(ranking.order[0])
        found.append(Best(texts[index], index, float(ranking.reward[index]), ranking))
    return found


@dataclass(frozen=True)
class MadePair:
    """A pair of completions that the ensemble is sure enough of.

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
        """Return the row as TRL's DPOTrainer reads it: text, or messages where the prompt is so.

        Parameters
        ----------
        soft : bool
            Whether the row carries ``votes`` of p and 1 − p, which this library trains on as a soft
            label. TRL has none of a row: its ``label_smoothing`` is one number for all.
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
    """Make DPO pairs of n samples a prompt: those whose calibrated probability is high enough.

    Each prompt gives its `per_prompt` pairs of the largest margin, the best against the worst
    first, as far as they pass. Equal completions count once. Taking the extremes of n selects for
    the ensemble's errors, too: the probability is that of a pair drawn as the judgments were, and
    the more samples, the more it flatters. A conservative aggregator takes some of that back.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated for its own aggregator.
    samples : iterable of Sample
        In any order; those of a prompt are found by it.
    threshold : float
        In [½, 1): the lowest P(chosen is preferred).
    per_prompt : int
        The most pairs of a prompt, ≥ 1.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    list of MadePair
        Prompt by prompt, in the order of their first samples.

    Raises
    ------
    NotCalibratedError, AggregatorMismatchError
        If the ensemble's margin has no probability.
    OptionError
        If the threshold or the number of pairs cannot be used.
    """
    if not 0.5 <= threshold < 1:
        raise OptionError(f"threshold must lie in [0.5, 1), not {threshold!r}")
    if per_prompt < 1:
        raise OptionError(f"per_prompt must be at least 1, not {per_prompt!r}")
    calibration = require_calibration(ensemble.calibration, ensemble.aggregator)
    prompts: dict[str, dict[str, Sample]] = {}
    for sample in samples:
        prompts.setdefault(prompt_key(sample.prompt), {}).setdefault(sample.completion, sample)
    several = [list(found.values()) for found in prompts.values() if len(found) > 1]
    asked = [sample for group in several for sample in group]
    reward = ensemble.score(asked, progress=progress).reward if asked else np.zeros(0)
    pairs, start = [], 0
    for group in several:
        part = reward[start : start + len(group)]
        pairs += _surest(group, part, calibration, threshold, per_prompt)
        start += len(group)
    return pairs


def _surest(
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
    found = []
    for place, probability in zip(largest, p, strict=True):
        first, second = int(order[i[place]]), int(order[j[place]])
        # A tie prefers neither, whatever the threshold.
        if probability >= threshold and margins[place] > 0:
            found.append(
                MadePair(
                    group[first].prompt,
                    group[first].completion,
                    group[second].completion,
                    float(probability),
                    float(reward[first]),
                    float(reward[second]),
                )
            )
    return found
