"""What an ensemble makes of n samples a prompt: the best of them.

Knows ensembles and text; the estimators of best-of-n, which know neither, are in `bestofn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_rm.errors import EmptyDataError
from ensemble_rm.members.trunk import Progress, silent
from ensemble_rm.results import Ranking
from ensemble_rm.samples import Prompt

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.ensemble import RewardEnsemble


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
    EmptyDataError
        If a prompt has no completion.
    """
    for row, texts in enumerate(completions):
        if len(texts) == 0:
            raise EmptyDataError(f"prompt {row} has no completion to choose; leave it out")
    chosen = ensemble if aggregator is None else ensemble.with_aggregator(aggregator)
    rankings = chosen.rank(prompts, completions, references=references, progress=progress)
    found = []
    for texts, ranking in zip(completions, rankings, strict=True):
        index = int(ranking.order[0])
        found.append(Best(texts[index], index, float(ranking.reward[index]), ranking))
    return found
