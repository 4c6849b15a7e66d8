"""Express a new ensemble's reward in an old one's units, so that λ, κ and β keep their meaning.

Knows scores of a reference set; knows nothing of judgments, training or versions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.normaliser import Normaliser, fit_normaliser
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.progress import Progress, silent

_REACH = 1e3  # searched range of the scale, as a factor around the proportional one


def same_units(
    candidate: RewardEnsemble,
    incumbent: RewardEnsemble,
    reference: Preferences,
    *,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Refit a candidate's normaliser so that its reward has the incumbent's mean and spread.

    Each member is scaled to the same RMS deviation within prompts on the reference completions, as
    in training. Then all are scaled by one factor and shifted by one constant, so that the
    *aggregated* reward has the incumbent's RMS deviation within prompts and its mean. Scaling the
    members alone would not suffice: where new members agree more, their aggregate is wider.

    Parameters
    ----------
    candidate, incumbent : RewardEnsemble
        The candidate gets the incumbent's aggregator.
    reference : Preferences
        Pairs whose completions are the fixed reference set; their verdicts are not used.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        The candidate in the incumbent's units, not calibrated.

    Raises
    ------
    DataError
        If `reference` is empty.
    OptionError
        If no common factor gives that spread.
    """
    require_pairs(reference, "refitting the units")
    samples, groups = reference.samples(), reference.sample_groups()
    target = reward_units(incumbent.score(samples, progress=progress).reward, groups)
    scores = candidate.score(samples, progress=progress).members
    own = fit_normaliser(scores, groups, nan=incumbent.aggregator.nan)
    aggregator = incumbent.aggregator.bind(candidate.names)
    factor = _factor(own(scores), groups, aggregator, target.scale[0])
    # After the scaling: the mean of an aggregate need not be proportional to the factor.
    level = reward_units(aggregator(factor * own(scores)), groups).offset[0]
    normaliser = _chain(candidate.normaliser, own, factor, target.offset[0] - level)
    return replace(candidate, normaliser=normaliser, aggregator=aggregator, calibration=None)


def reward_units(
    reward: Floats, groups: Floats | np.ndarray[tuple[int], np.dtype[np.int64]]
) -> Normaliser:
    """Return a reward's mean and its RMS deviation within prompts, as a one-column normaliser."""
    return fit_normaliser(reward[:, None], groups)


def _factor(members: Floats, groups: object, aggregator: Aggregator, target: float) -> float:
    """Return the c for which the aggregate of c·members has the spread `target`.

    In proportion if the aggregator is homogeneous; otherwise, as for UWO, whose penalty is a
    variance, the nearest root.
    """

    def excess(log_factor: float) -> float:
        reward = aggregator(math.exp(log_factor) * members)
        return reward_units(reward, groups).scale[0] - target  # type: ignore[arg-type]

    # excess(0) + target is the spread at factor 1, so this is exact for a homogeneous aggregate.
    start = math.log(target) - math.log(excess(0.0) + target)
    if abs(excess(start)) <= 1e-12 * target:
        return math.exp(start)
    # Widen in small steps on both sides, to find the root nearest to `start`.
    step = 0.02
    while step <= math.log(_REACH):
        for low, high in ((start, start + step), (start - step, start)):
            if excess(low) * excess(high) <= 0:
                return math.exp(float(brentq(excess, low, high, xtol=1e-14)))
        step *= 1.5
    raise OptionError(
        f"no scale gives the members a reward by {aggregator} whose RMS within prompts is "
        f"{target:.4g}; use another aggregator, or train a new ensemble and choose its coefficient"
    )


def _chain(first: Normaliser, then: Normaliser, factor: float, shift: float) -> Normaliser:
    """Return x ↦ factor·then(first(x)) + shift as one normaliser."""
    s, o = np.array(first.scale), np.array(first.offset)
    b, a = np.array(then.scale), np.array(then.offset)
    # Solve factor·((x − o)/s − a)/b + shift = (x − offset)/scale; each (n_members,).
    scale = s * b / factor
    offset = o + s * a - shift * scale
    return Normaliser(tuple(offset.tolist()), tuple(scale.tolist()), first.baseline)
