"""How much the members disagree: pointwise spread, the split of a pair's uncertainty, herding.

Knows arrays of scores and margins; knows nothing of models or judgments.

References
----------
.. [1] Houlsby et al. 2011, arXiv 1112.5745: BALD, the mutual information.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, expit

from ensemble_rm.aggregation.aggregator import score_matrix
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import NonFiniteScoreError, OneMemberError, OptionError


@dataclass(frozen=True)
class PairUncertainty:
    """The uncertainty of each pair, in nats, all on one mixture.

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


def _several(scores: ArrayLike, what: str) -> Floats:
    matrix = score_matrix(scores)
    if matrix.shape[1] < 2:
        raise OneMemberError(f"{what} needs at least 2 members, not 1; train an ensemble")
    if not np.isfinite(matrix).all():
        raise NonFiniteScoreError(f"{what} needs finite scores; some are NaN or infinite")
    return matrix


def member_std(scores: ArrayLike, *, ddof: int = 1) -> Floats:
    """Spread of the members at each sample.

    Parameters
    ----------
    scores : array_like, shape (n_samples, n_members)
        Normalised scores.
    ddof : int
        Divisor k − ddof; 1 is the unbiased variance. At k = 5 the variance itself is uncertain
        by about 71 %.

    Returns
    -------
    ndarray, shape (n_samples,)
        In the unit of the scores.

    Raises
    ------
    OneMemberError
        If there is one member: it has no epistemic uncertainty.
    """
    return np.asarray(_several(scores, "the members' std").std(axis=1, ddof=ddof), dtype=np.float64)


def binary_entropy(p: ArrayLike) -> Floats:
    """Entropy of a coin, in nats; 0 at 0 and 1."""
    q = np.asarray(p, dtype=np.float64)
    return np.asarray(entr(q) + entr(1.0 - q), dtype=np.float64)


def split_uncertainty(member_margins: ArrayLike, *, mixture_temperature: float) -> PairUncertainty:
    """Split each pair's uncertainty into aleatoric and epistemic [1]_.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Normalised score of the first minus that of the second.
    mixture_temperature : float
        T_mix > 0, fitted on the NLL of the mixture.

    Returns
    -------
    PairUncertainty
        In nats.

    Raises
    ------
    OneMemberError
        If there is one member.
    """
    margins = _several(member_margins, "epistemic uncertainty")
    if not mixture_temperature > 0:
        raise OptionError(f"mixture_temperature must be > 0, not {mixture_temperature!r}")
    p = np.asarray(expit(margins / mixture_temperature))
    mixture = np.asarray(p.mean(axis=1), dtype=np.float64)
    total = binary_entropy(mixture)
    aleatoric = np.minimum(binary_entropy(p).mean(axis=1), total)
    return PairUncertainty(mixture, total, aleatoric, total - aleatoric)


def margin_correlation(member_margins: ArrayLike) -> Floats:
    """Correlate the members' margins with one another.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Margins in any unit.

    Returns
    -------
    ndarray, shape (n_members, n_members)
        Pearson correlations about zero: a pair's orientation is arbitrary, so its mean is.
    """
    margins = _several(member_margins, "the correlation of margins")
    norms = np.sqrt((margins**2).sum(axis=0))
    if not (norms > 0).all():
        raise OptionError(f"member {int(np.argmin(norms))} has only zero margins")
    return np.asarray(margins.T @ margins / np.outer(norms, norms), dtype=np.float64)


def mean_correlation(correlation: ArrayLike) -> float:
    """Average a correlation matrix over its distinct pairs of members."""
    matrix = _several(correlation, "the mean correlation")
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def effective_size(errors: ArrayLike) -> float:
    """Count the independent members that an ensemble is worth, k/(1 + (k − 1)ρ).

    Parameters
    ----------
    errors : array_like, shape (n, n_members)
        Each member's score minus **gold**. On human labels the shared label noise makes the
        figure meaningless.

    Returns
    -------
    float
        Between 1 and k for ρ in [0, 1].
    """
    matrix = _several(errors, "the effective ensemble size")
    rho = mean_correlation(np.corrcoef(matrix, rowvar=False))
    k = matrix.shape[1]
    return float(k / (1 + (k - 1) * max(rho, 0.0)))
