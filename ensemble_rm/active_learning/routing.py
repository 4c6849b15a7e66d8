"""Which comparisons are worth a judge: those of which the ensemble is not sure.

The ensemble compares every pair; pairs whose calibrated uncertainty reaches a threshold go to a
judge [1]_, and those that it cannot answer, or that a budget leaves over, to the human pool. Knows
comparators and selected pairs; knows nothing of servers or of files.

References
----------
.. [1] Xu et al. 2025, arXiv 2510.20369: ask a strong judge when the reward model is uncertain; by
   what the model does not know, since a judge does not help where answers are equally good.
.. [2] Genest & Zidek 1986: the logarithmic opinion pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, expit, logit

from ensemble_rm.active_learning.selection import SelectedPairs, pair_names, pairs_for_humans
from ensemble_rm.arrays import Floats
from ensemble_rm.data.samples import Preferences
from ensemble_rm.ensemble.results import Comparison
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import DataError, NonFiniteScoreError, OptionError
from ensemble_rm.members.comparator import Comparator, Compared
from ensemble_rm.members.judges.comparator import JudgeVerdicts
from ensemble_rm.members.judges.usage import Usage
from ensemble_rm.progress import Progress, silent
from ensemble_rm.uncertainty.disagreement import unknown_as_most

Route: TypeAlias = Literal["ensemble", "judge"]
UNCERTAINTIES = ("epistemic", "total", "aleatoric", "predictive")
FINALS = ("judge", "pooled")

_NEAR = 1e-3  # a judge's certainty is not taken at its word in a pool of two


@dataclass(frozen=True, slots=True)
class Saving:
    """What routing asked of the judge, beside what asking it for every pair would have taken.

    Attributes
    ----------
    pairs, judged : int
        All pairs, and those that went to the judge.
    usage : Usage
        What those took.
    """

    pairs: int
    judged: int
    usage: Usage

    @property
    def share(self) -> float:
        """Share of the pairs that went to the judge."""
        return self.judged / self.pairs

    @property
    def without(self) -> Usage | None:
        """What all pairs would have taken, at the mean of what was asked; None where nothing was.

        A pair takes as many questions as those judged did, those among them that the judge was out
        of reach for.
        """
        u = self.usage
        asked = u.calls + u.failed
        if asked == 0:
            return None
        by = self.pairs / self.judged * (asked + u.unreached) / asked
        return Usage(
            round(asked * by),
            0,
            round(u.prompt_tokens * by),
            round(u.completion_tokens * by),
            u.seconds * by,
            None if u.cost is None else u.cost * by,
        )

    def to_json(self) -> dict[str, Any]:
        """Return both sides and the share."""
        without = self.without
        return {
            "pairs": self.pairs,
            "judged": self.judged,
            "share": self.share,
            "usage": self.usage.to_json(),
            "usage_of_all": None if without is None else without.to_json(),
        }


@dataclass(frozen=True, eq=False)
class Routed:
    """Routed comparisons, in the order of the pairs.

    Attributes
    ----------
    probability : ndarray, shape (n_pairs,)
        P(first is preferred), by whoever it was routed to.
    routes : tuple of {"ensemble", "judge"}
        Whose it is; a judgment that failed leaves the ensemble's.
    uncertainty : ndarray, shape (n_pairs,)
        The ensemble's, in nats; see `pair_uncertainty`.
    threshold : float
        The least uncertainty that was routed.
    comparison : Comparison
        What the ensemble says of all pairs.
    judge_probability : ndarray, shape (n_pairs,)
        What the judge says; NaN where it was not asked, or failed.
    failures : tuple of (str or None)
        Why a pair that the judge was asked about has no judgment.
    pool : SelectedPairs
        For humans: the uncertain pairs without a judgment, π = 1, and of the others a random
        share. Their sides stand in random order; rows of one name are one pair.
    saving : Saving
    """

    probability: Floats
    routes: tuple[Route, ...]
    uncertainty: Floats
    threshold: float
    comparison: Comparison
    judge_probability: Floats
    failures: tuple[str | None, ...]
    pool: SelectedPairs
    saving: Saving


def pair_uncertainty(comparison: Comparison, uncertainty: str) -> Floats:
    """Return how unsure an ensemble is of each pair, in nats.

    Parameters
    ----------
    comparison : Comparison
    uncertainty : {"epistemic", "total", "aleatoric", "predictive"}
        The members' mutual information, the entropy of their mixture, the mean of their entropies;
        or H[p] of the calibrated probability, which one member has, too.

    Returns
    -------
    ndarray, shape (n_pairs,)
        ln 2, the most there is, for a pair that fewer than two members scored.

    Raises
    ------
    OptionError
        If there is none of that name.
    OneMemberError
        If one member has none.
    """
    if uncertainty not in UNCERTAINTIES:
        raise OptionError(f"uncertainty must be one of {UNCERTAINTIES}, not {uncertainty!r}")
    if uncertainty == "predictive":
        p = comparison.probability
        return np.asarray(entr(p) + entr(1.0 - p), dtype=np.float64)
    found: Floats = getattr(comparison.uncertainty, uncertainty)
    return unknown_as_most(found)


def threshold_for_share(uncertainty: ArrayLike, share: float) -> float:
    """Return the threshold that at most a share of such pairs reaches, and as many as can.

    Parameters
    ----------
    uncertainty : array_like, shape (n_pairs,)
        Of pairs like those to come, in nats.
    share : float
        In [0, 1]: of the pairs that may go to the judge.

    Returns
    -------
    float
        In nats. Pairs of equal uncertainty stay together.

    Raises
    ------
    OptionError
        If the share is out of its range.
    DataError
        If there is no pair.
    """
    values = np.sort(np.asarray(uncertainty, dtype=np.float64))[::-1]
    if not 0 <= share <= 1:
        raise OptionError(f"share must lie in [0, 1], not {share!r}")
    if len(values) == 0:
        raise DataError("a threshold needs the uncertainty of at least one pair; there is none")
    if not np.isfinite(values).all():
        raise NonFiniteScoreError("a threshold needs finite uncertainties; some are not")
    k = int(share * len(values) + 1e-9)
    if k == len(values):
        return float(values[-1])
    # What is above the first that may not pass.
    above = values[values > values[k]]
    return float(above[-1]) if len(above) else float(np.nextafter(values[0], np.inf))


def choose_threshold(
    ensemble: RewardEnsemble,
    pairs: Preferences,
    *,
    share: float,
    uncertainty: str = "epistemic",
    progress: Progress = silent,
) -> float:
    """Return the threshold for a budget: at most a share of such pairs goes to the judge.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated.
    pairs : Preferences
        Like those to come; their verdicts do not count.
    share : float
        In [0, 1].
    uncertainty : str
        See `pair_uncertainty`.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    float
        In nats.
    """
    found = _compare(ensemble, pairs, progress)
    return threshold_for_share(pair_uncertainty(found, uncertainty), share)


def route(
    ensemble: RewardEnsemble,
    pairs: Preferences,
    *,
    threshold: float | None = None,
    share: float | None = None,
    judge: Comparator | None = None,
    uncertainty: str = "epistemic",
    budget: int | None = None,
    final: str = "judge",
    audit_share: float = 0.1,
    seed: int = 0,
    progress: Progress = silent,
) -> Routed:
    """Compare pairs, and ask a judge about those of which the ensemble is not sure.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated.
    pairs : Preferences
        As `read_comparisons` reads them; their verdicts do not count.
    threshold : float, optional
        In nats: pairs of at least this uncertainty are routed; see `choose_threshold`.
    share : float, optional
        In its place: at most this share of these very pairs is.
    judge : Comparator, optional
        Such as a `JudgeComparator`, or a larger ensemble; where there is none, all pairs that are
        routed go to the human pool.
    uncertainty : {"epistemic", "total", "aleatoric", "predictive"}
        See `pair_uncertainty`.
    budget : int, optional
        Most pairs that the judge is asked about: the most uncertain.
    final : {"judge", "pooled"}
        Whose probability a judged pair has: the judge's, or that of the mean of both logits [2]_.
    audit_share : float
        In [0, 1]: the probability with which any other pair joins the pool, so that what humans
        say of it can be weighted to say something of all pairs, and of the judge.
    seed : int
        Of the audit and of the pool's sides.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Routed

    Raises
    ------
    OptionError
        If an option cannot be used.
    DataError
        If there is no pair, or two different ones bear one id.
    NotCalibratedError
        If the ensemble is not calibrated.
    RemoteUnavailableError, RemoteRefusalError
        If the judge cannot be asked at all.
    """
    _check(threshold, share, budget, final, audit_share)
    if len(pairs) == 0:
        raise DataError(f"{pairs.source} holds no pair to route")
    names = pair_names(pairs)  # refused before anything is asked
    found = _compare(ensemble, pairs, progress)
    value = pair_uncertainty(found, uncertainty)
    if threshold is None:
        threshold = threshold_for_share(value, 0.0 if share is None else share)
    unsure = np.flatnonzero(value >= threshold)
    asked = np.empty(0, dtype=np.int64)
    if judge is not None:
        ranked = unsure[np.argsort(-value[unsure], kind="stable")]
        asked = np.sort(ranked[: len(ranked) if budget is None else budget])
    said, failures, usage = _ask(judge, pairs, asked)
    judged = np.isfinite(said)
    p = found.probability.copy()
    if final == "judge":
        p[judged] = said[judged]
    else:
        both = (p[judged], said[judged])
        p[judged] = expit(sum(logit(np.clip(one, _NEAR, 1 - _NEAR)) for one in both) / 2)
    waiting = np.zeros(len(pairs), dtype=np.bool_)
    waiting[unsure] = True
    pool = pairs_for_humans(
        pairs,
        names,
        waiting & ~judged,
        audit_share=audit_share,
        seed=seed,
        strategy=f"route-{uncertainty}",
    )
    routes: tuple[Route, ...] = tuple("judge" if one else "ensemble" for one in judged)
    saving = Saving(len(pairs), len(asked), usage)
    return Routed(p, routes, value, threshold, found, said, failures, pool, saving)


def _check(
    threshold: float | None,
    share: float | None,
    budget: int | None,
    final: str,
    audit_share: float,
) -> None:
    if (threshold is None) == (share is None):
        raise OptionError("name a threshold or a share, one of the two")
    if threshold is not None and not threshold >= 0:
        raise OptionError(f"threshold must be a number of nats ≥ 0, not {threshold!r}")
    if budget is not None and budget < 0:
        raise OptionError(f"budget must be a number of pairs ≥ 0, not {budget!r}")
    if final not in FINALS:
        raise OptionError(f"final must be one of {FINALS}, not {final!r}")
    if not 0 <= audit_share <= 1:
        raise OptionError(f"audit_share must lie in [0, 1], not {audit_share!r}")


def _compare(ensemble: RewardEnsemble, pairs: Preferences, progress: Progress) -> Comparison:
    return ensemble.compare(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        subsets=pairs.subsets,
        references=[pair.reference for pair in pairs],
        progress=progress,
    )


def _ask(
    judge: Comparator | None, pairs: Preferences, rows: NDArray[np.int64]
) -> tuple[Floats, tuple[str | None, ...], Usage]:
    """Return what the judge says of these rows, NaN elsewhere; why it failed; what it took."""
    said = np.full(len(pairs), np.nan)
    failures: list[str | None] = [None] * len(pairs)
    if judge is None or len(rows) == 0:
        return said, tuple(failures), Usage()
    chosen = pairs.take(rows)
    found: Compared
    if isinstance(judge, RewardEnsemble):
        found = _compare(judge, chosen, silent)
    else:
        found = judge.compare(
            [pair.prompt for pair in chosen],
            [pair.chosen for pair in chosen],
            [pair.rejected for pair in chosen],
        )
    said[rows] = found.probability
    errors: Mapping[int, Exception] = {}
    usage = Usage(calls=len(rows))
    if isinstance(found, JudgeVerdicts):
        errors, usage = found.errors, found.usage
    for i, row in enumerate(rows.tolist()):
        if np.isnan(said[row]):
            failures[row] = str(errors[i]) if i in errors else "the judge has no judgment"
    return said, tuple(failures), usage
