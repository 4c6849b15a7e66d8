"""Disagreement of the members: spread per sample, uncertainty per pair, correlation of errors.

References
----------
.. [1] Houlsby et al. 2011, arXiv 1112.5745: BALD, the mutual information.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, expit

from ensemble_rm.aggregation.aggregator import NanPolicy, score_matrix
from ensemble_rm.arrays import Floats, mean_of_present
from ensemble_rm.errors import NonFiniteScoreError, OneMemberError, OptionError


@dataclass(frozen=True)
class PairUncertainty:
    """The uncertainty of each pair in nats, for the mixture of the members.

    Attributes
    ----------
    mixture_probability : ndarray, shape (n_pairs,)
        p̄ = mean over members of σ(Δᵢ/T_mix); not the calibrated probability.
    total, aleatoric, epistemic : ndarray, shape (n_pairs,)
        H[p̄], the mean of H[σ(Δᵢ/T_mix)], and their difference, the mutual information [1]_.
    """

    mixture_probability: Floats
    total: Floats
    aleatoric: Floats
    epistemic: Floats


def _several(scores: ArrayLike, what: str, nan: NanPolicy = "raise") -> Floats:
    matrix = score_matrix(scores)
    if matrix.shape[1] < 2:
        raise OneMemberError(f"{what} needs at least 2 members, not 1; train an ensemble")
    # NaN is a member that failed, which "omit" allows; infinity is never a score.
    bad = np.isinf(matrix) if nan == "omit" else ~np.isfinite(matrix)
    if bad.any():
        raise NonFiniteScoreError(f"{what} needs finite scores; some are NaN or infinite")
    return matrix


def member_std(scores: ArrayLike, *, ddof: int = 1, nan: NanPolicy = "raise") -> Floats:
    """Return the standard deviation over the members at each sample.

    Parameters
    ----------
    scores : array_like, shape (n_samples, n_members)
        Normalised scores.
    ddof : int
        Divisor k − ddof; 1 is the unbiased variance. At k = 5 the variance itself is uncertain
        by about 71 %.
    nan : {"raise", "omit"}
        Whether a missing score is an error or left out. Where fewer than two scores are left, the
        result is NaN.

    Returns
    -------
    ndarray, shape (n_samples,)
        In the unit of the scores.

    Raises
    ------
    OneMemberError
        If there is one member: it has no epistemic uncertainty.
    NonFiniteScoreError
        If a score is infinite, or is NaN against `nan`.
    """
    matrix = _several(scores, "the members' std", nan)
    counts = (~np.isnan(matrix)).sum(axis=1)
    # Mean over the members that scored, then ddof over their number: counts differ by row.
    squares = mean_of_present((matrix - mean_of_present(matrix)[:, None]) ** 2, fewest=2)
    return np.asarray(np.sqrt(squares * (counts / np.maximum(counts - ddof, 1))))


def binary_entropy(p: ArrayLike) -> Floats:
    """Entropy of a Bernoulli variable in nats; 0 at p = 0 and p = 1."""
    q = np.asarray(p, dtype=np.float64)
    return np.asarray(entr(q) + entr(1.0 - q), dtype=np.float64)


def split_uncertainty(
    member_margins: ArrayLike, *, mixture_temperature: float, nan: NanPolicy = "raise"
) -> PairUncertainty:
    """Split each pair's uncertainty into aleatoric and epistemic [1]_.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Normalised score of the first minus that of the second.
    mixture_temperature : float
        T_mix > 0, fitted on the NLL of the mixture.
    nan : {"raise", "omit"}
        Whether a member that did not score both sides is an error or left out of the mixture. A
        pair with fewer than two members is NaN in all parts, since they have no disagreement.

    Returns
    -------
    PairUncertainty
        In nats.

    Raises
    ------
    OneMemberError
        If there is one member.
    NonFiniteScoreError
        If a margin is infinite, or is NaN against `nan`.
    """
    margins = _several(member_margins, "epistemic uncertainty", nan)
    if not mixture_temperature > 0:
        raise OptionError(f"mixture_temperature must be > 0, not {mixture_temperature!r}")
    p = np.asarray(expit(margins / mixture_temperature))
    mixture = mean_of_present(p, fewest=2)
    total = binary_entropy(mixture)
    # Jensen's inequality holds exactly; rounding may break it by an ulp.
    aleatoric = np.minimum(mean_of_present(binary_entropy(p), fewest=2), total)
    return PairUncertainty(mixture, total, aleatoric, total - aleatoric)


def unknown_as_most(nats: Floats) -> Floats:
    """Replace NaN by ln 2, the largest possible uncertainty of a binary verdict."""
    return np.where(np.isnan(nats), np.log(2.0), nats)


def margin_correlation(member_margins: ArrayLike, *, nan: NanPolicy = "raise") -> Floats:
    """Correlation matrix of the members' margins.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Margins in any unit.
    nan : {"raise", "omit"}
        Whether a missing margin is an error or left out; two members are then correlated over the
        pairs that both scored.

    Returns
    -------
    ndarray, shape (n_members, n_members)
        Pearson correlations about zero: the orientation of a pair is arbitrary, and so is the mean
        margin.
    """
    margins = _several(member_margins, "the correlation of margins", nan)
    present = ~np.isnan(margins)
    known = np.where(present, margins, 0.0)
    # Each pair of members is compared on the pairs that both scored.
    squares = (known**2).T @ present  # row member's squares over the pairs that the column scored
    if not (squares > 0).all():
        raise OptionError(f"member {int(np.argmin(squares.min(axis=1)))} has only zero margins")
    return np.asarray(known.T @ known / np.sqrt(squares * squares.T), dtype=np.float64)


def mean_correlation(correlation: ArrayLike) -> float:
    """Mean of a correlation matrix over distinct pairs of members."""
    matrix = _several(correlation, "the mean correlation")
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def effective_size(errors: ArrayLike) -> float:
    """Effective number of independent members, k/(1 + (k − 1)ρ).

    Parameters
    ----------
    errors : array_like, shape (n, n_members)
        Each member's score minus **gold**. On human labels the result is meaningless: the members
        share the label noise.

    Returns
    -------
    float
        Between 1 and k for ρ in [0, 1].
    """
    matrix = _several(errors, "the effective ensemble size")
    rho = mean_correlation(np.corrcoef(matrix, rowvar=False))
    k = matrix.shape[1]
    # A negative mean correlation would claim more than k members.
    return float(k / (1 + (k - 1) * max(rho, 0.0)))
