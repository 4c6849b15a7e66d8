"""Reward models that exist already → one ensemble: published models, saved ensembles, own scorers.

Nothing is trained; the normaliser is fitted on reference completions, so that the members' scores
have one unit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator, mean
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.members.baseline import baseline_scores
from ensemble_rm.members.classifier import ClassifierScorer
from ensemble_rm.members.scorer import Scorer, StoredScorer, score_all
from ensemble_rm.members.trunk import Progress, TrunkOptions, silent
from ensemble_rm.samples import Preferences, require_pairs
from ensemble_rm.storage import FILE


def combine(
    members: Mapping[str, Scorer | RewardEnsemble | str | Path],
    reference: Preferences,
    *,
    aggregator: Aggregator | None = None,
    options: TrunkOptions | None = None,
    baseline: bool = False,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Put reward models side by side, and fit their offsets and scales.

    Parameters
    ----------
    members : mapping of str to Scorer, RewardEnsemble, str or Path
        By the name that each shall bear: a scorer, an ensemble, a saved ensemble's folder, or a
        sequence-classification model of one output (Hub id or folder).
    reference : Preferences
        Pairs whose completions set each member's offset and scale; their verdicts do not count.
    aggregator : Aggregator, optional
        The mean where not given.
    options : TrunkOptions, optional
        How models that are named read text.
    baseline : bool
        Whether the score of each prompt's `reference` completion is subtracted.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        Normalised and not calibrated.

    Raises
    ------
    OptionError
        If there is no member, or a member scores all completions of a prompt alike.
    EmptyDataError
        If there is no reference pair.
    BackboneError, MissingHeadError
        If a model that is named cannot be a member.
    """
    require_pairs(reference, "fitting the normaliser")
    if not members:
        raise OptionError("an ensemble needs at least one member")
    scorers = tuple(
        scorer
        for name, member in members.items()
        for scorer in _open(name, member, options or TrunkOptions())
    )
    samples = reference.samples()
    raw, _ = score_all(scorers, samples, progress=progress)
    below = None
    if baseline:
        below = np.concatenate([baseline_scores(s, samples) for s in scorers], axis=1)
    return RewardEnsemble(
        scorers,
        fit_normaliser(raw, reference.sample_groups(), baseline=below),
        aggregator or mean(),
        provenance={
            "members": {
                name: str(member) if isinstance(member, str | Path) else type(member).__name__
                for name, member in members.items()
            },
            "reference": {
                "source": reference.source,
                "pairs": len(reference),
                "digest": reference.digest,
            },
        },
    )


def _open(
    name: str, member: Scorer | RewardEnsemble | str | Path, options: TrunkOptions
) -> tuple[Scorer, ...]:
    if isinstance(member, str | Path):
        if not (Path(member).expanduser() / FILE).exists():
            return (ClassifierScorer.from_name(member, options, name=name),)
        member = RewardEnsemble.from_pretrained(member, device=options.device)
    if isinstance(member, RewardEnsemble):
        return tuple(_renamed(scorer, name) for scorer in member.scorers)
    return (member,)


def _renamed(scorer: Scorer, name: str) -> Scorer:
    """Return a copy whose columns bear the member's name before their own."""
    if not isinstance(scorer, StoredScorer):
        return scorer
    twin = copy.copy(scorer)
    twin.names = tuple(f"{name}/{own}" for own in scorer.names)  # type: ignore[misc]
    return twin
