"""Whether a candidate may replace the incumbent, by judgments that it was not fitted on.

Both predict the same judgments; the difference of their losses is compared prompt by prompt. If
jobs run more often than the gate's part is long, the incumbent was fitted on some of these
judgments, which favours the incumbent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.methods.temperature import margin_losses
from ensemble_rm.data.weights import effective_sample_size
from ensemble_rm.errors import OptionError
from ensemble_rm.evidence.window import Ints


@dataclass(frozen=True, slots=True)
class Gate:
    """The result of a gate.

    Attributes
    ----------
    passed : bool
        Whether the candidate may be published.
    reason : str
        Why, in words.
    nll_before, nll_after : float
        Of the incumbent and the candidate, nats per judgment.
    difference : float
        The candidate's NLL minus the incumbent's; negative if the candidate is better.
    se : float
        Standard error of the difference, over prompts.
    upper : float
        One-sided upper bound of the difference.
    delta, level : float
        The rise of the NLL to exclude, nats, and the confidence.
    judgments, prompts : int
        Their numbers.
    effective : float
        Kish's effective number of judgments.
    """

    passed: bool
    reason: str
    nll_before: float
    nll_after: float
    difference: float
    se: float
    upper: float
    delta: float
    level: float
    judgments: int
    prompts: int
    effective: float


def losses(margins: Floats, targets: Floats, temperatures: ArrayLike) -> Floats:
    """Return −y log σ(Δ/T) − (1 − y) log σ(−Δ/T) per judgment, accurate at any margin.

    Parameters
    ----------
    margins, targets : ndarray, shape (n_judgments,)
    temperatures : array_like, shape (n_judgments,) or ()
        Infinity, where every probability is ½, is allowed.
    """
    return margin_losses(margins / np.asarray(temperatures, dtype=np.float64), targets)


def clustered_mean(
    values: Floats, weights: Floats, groups: NDArray[np.int64]
) -> tuple[float, float, int]:
    """Return the weighted mean, its standard error over groups, and the number of groups.

    The linearised variance of a ratio of sums over clusters, with the usual G/(G − 1).
    """
    labels = np.unique(groups, return_inverse=True)[1]
    total = float(weights.sum())
    mean = float((weights * values).sum()) / total
    sums = np.bincount(labels, weights * (values - mean))
    g = len(sums)
    if g < 2:
        # One group says nothing about the variance; no gate passes with an infinite error.
        return mean, math.inf, g
    return mean, math.sqrt(float((sums**2).sum()) * g / (g - 1)) / total, g


def judge_candidate(
    before: Floats,
    after: Floats,
    *,
    weights: Floats,
    groups: Ints,
    delta: float,
    level: float = 0.95,
) -> Gate:
    """Compare two predictors' losses on the same judgments.

    The candidate passes if its mean loss is lower, and a mean loss higher by more than `delta` can
    be excluded. The first condition requires a better point estimate, not a proven gain, which a
    month's judgments could hardly ever show; the second rejects a candidate about which the
    judgments say too little.

    Parameters
    ----------
    before, after : ndarray, shape (n_judgments,)
        Losses of the incumbent and the candidate, nats.
    weights : ndarray, shape (n_judgments,)
    groups : ndarray of int, shape (n_judgments,)
        Prompt of each judgment; judgments of one prompt are not independent.
    delta : float
        Nats per judgment, > 0.
    level : float
        Confidence of the one-sided bound.

    Returns
    -------
    Gate
    """
    if not delta > 0:
        raise OptionError(f"delta must be > 0 nats, not {delta}")
    difference, se, prompts = clustered_mean(after - before, weights, groups)
    reach = float(student.ppf(level, max(prompts - 1, 1))) * se if se > 0 else 0.0
    upper = difference + reach
    passed = difference < 0 and upper <= delta
    if passed:
        reason = f"NLL falls by {-difference:.5f} nats; a rise above {upper:+.5f} is excluded"
    elif difference >= 0:
        reason = f"the candidate is not better on the newest judgments ({difference:+.5f} nats)"
    else:
        reason = (
            f"NLL falls by {-difference:.5f} nats, and a rise of {upper:.5f} is not excluded "
            f"(delta {delta}); collect more judgments"
        )
    weighted = float(weights.sum())
    return Gate(
        passed,
        reason,
        float((weights * before).sum()) / weighted,
        float((weights * after).sum()) / weighted,
        difference,
        se,
        upper,
        delta,
        level,
        len(before),
        prompts,
        effective_sample_size(weights),
    )
