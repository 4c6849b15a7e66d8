"""Acquisition functions: what a judgment of each pair is worth, by the ensemble's scores.

References
----------
.. [1] Houlsby et al. 2011, arXiv 1112.5745: BALD.
.. [2] Lewis & Gale 1994: uncertainty sampling.
.. [3] Krogh & Vedelsby 1995; Seung et al. 1992: disagreement of a committee.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.data.samples import Preferences, Sample
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.ensemble.streaming import DEFAULT_CHUNK, stream_scores
from ensemble_rm.errors import NotCalibratedError, OptionError
from ensemble_rm.progress import Progress, silent
from ensemble_rm.uncertainty.disagreement import member_std, split_uncertainty

Strategy: TypeAlias = Literal["bald", "margin", "disagreement", "random"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True, eq=False)
class PoolMargins:
    """Margins of a pool's pairs, first minus second, in normalised units.

    Attributes
    ----------
    margin : ndarray, shape (n_pairs,)
        Margin of the aggregated reward.
    member_margins : ndarray, shape (n_pairs, n_members)
        Margin of each member.
    mixture_temperature : float, optional
        T_mix of the calibration; None without a calibration.
    """

    margin: Floats
    member_margins: Floats
    mixture_temperature: float | None = None


def score_pool(
    ensemble: RewardEnsemble,
    pool: Preferences,
    *,
    chunk: int = DEFAULT_CHUNK,
    progress: Progress = silent,
) -> PoolMargins:
    """Score both sides of every pair, at most `chunk` samples at a time.

    Parameters
    ----------
    ensemble : RewardEnsemble
    pool : Preferences
        Pairs from `read_comparisons`: chosen is the first side, rejected the second.
    chunk : int
        Maximum number of samples per call.
    progress : callable
        Called with (stage, done, total).
    """
    samples = (
        # A generator with both sides next to each other: a chunk holds whole pairs' prompts.
        Sample(pair.prompt, text, pair.reference)
        for pair in pool
        for text in (pair.chosen, pair.rejected)
    )
    rewards, members = [], []
    total = 2 * len(pool)
    for scores in stream_scores(
        ensemble, samples, chunk=chunk, progress=lambda stage, done, _: progress(stage, done, total)
    ):
        rewards.append(scores.reward)
        members.append(scores.members)
    reward, all_members = np.concatenate(rewards), np.concatenate(members)
    calibration = ensemble.calibration
    return PoolMargins(
        # Sides alternate: even rows are the first side.
        reward[::2] - reward[1::2],
        all_members[::2] - all_members[1::2],
        None if calibration is None else calibration.mixture_temperature,
    )


def utility(margins: PoolMargins, strategy: str) -> Floats | None:
    """Return what a judgment of each pair is worth; None where all are worth the same.

    Parameters
    ----------
    margins : PoolMargins
    strategy : {"bald", "margin", "disagreement", "random"}
        ``"bald"``: mutual information of verdict and member in nats [1]_. ``"margin"``: −|margin|,
        which orders pairs as their predictive entropy under one temperature does [2]_.
        ``"disagreement"``: standard deviation of the members' margins [3]_. ``"random"``: None.
        With fewer than two scores a pair ranks last under bald and disagreement.

    Returns
    -------
    ndarray, shape (n_pairs,), or None

    Raises
    ------
    OptionError
        If the strategy is unknown.
    NotCalibratedError
        If the strategy is ``"bald"`` and the ensemble has no calibration.
    OneMemberError
        If the strategy is ``"bald"`` or ``"disagreement"`` and there is one member.
    """
    if strategy == "random":
        return None
    if strategy == "margin":
        # Near 0 the verdict is open, hence worth most.
        return -np.abs(margins.margin)
    if strategy == "disagreement":
        return _unknown_last(member_std(margins.member_margins, nan="omit"))
    if strategy == "bald":
        if margins.mixture_temperature is None:
            raise NotCalibratedError(
                "strategy 'bald' needs probabilities, and this ensemble has no calibration; run "
                "`ensemble-rm calibrate` first, or use strategy 'disagreement' or 'margin'"
            )
        split = split_uncertainty(
            margins.member_margins,
            mixture_temperature=margins.mixture_temperature,
            nan="omit",
        )
        return _unknown_last(split.epistemic)
    raise OptionError(f"strategy must be one of {STRATEGIES}, not {strategy!r}")


def _unknown_last(values: Floats) -> Floats:
    # Below every known utility, which is never negative.
    return np.where(np.isnan(values), -1.0, values)
