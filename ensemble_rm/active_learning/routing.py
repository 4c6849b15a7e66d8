"""Route uncertain comparisons to a judge.

The ensemble compares every pair. Pairs whose calibrated uncertainty reaches a threshold go to a
judge [1]_; those that it cannot judge, or that exceed a budget, go to the human pool.

References
----------
.. [1] Xu et al. 2025, arXiv 2510.20369: ask a strong judge when the reward model is uncertain. Use
   epistemic uncertainty: a judge does not help where both completions are equally good.
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

_NEAR = 1e-3  # clip before pooling, so that a judge's 0 or 1 does not decide alone


@dataclass(frozen=True, slots=True)
class Saving:
    """Use of the judge, compared with an estimate for judging every pair.

    Attributes
    ----------
    pairs, judged : int
        Number of all pairs, and of those that went to the judge.
    usage : Usage
        Calls, tokens, seconds and cost of the judged pairs.
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
        """Estimated usage for all pairs, at the mean of the judged ones; None if none was judged.

        Calls that did not reach the judge count as well, since each pair needs as many.
        """
        u = self.usage
        calls = u.calls + u.failed
        if calls == 0:
            # Calls per pair of those that were tried; unreached ones would have cost calls too.
            return None
        by = self.pairs / self.judged * (calls + u.unreached) / calls
        return Usage(
            round(calls * by),
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
        P(first is preferred) by the ensemble or the judge, see `routes`.
    routes : tuple of {"ensemble", "judge"}
        Source of each probability; where the judge failed it is the ensemble.
    uncertainty : ndarray, shape (n_pairs,)
        Uncertainty of the ensemble in nats, see `pair_uncertainty`.
    threshold : float
        Pairs with at least this uncertainty were routed.
    comparison : Comparison
        The ensemble's comparison of all pairs.
    judge_probability : ndarray, shape (n_pairs,)
        P(first is preferred) by the judge; NaN where it was not asked or failed.
    failures : tuple of (str or None)
        Why the judge has no judgment of a pair that it was asked about.
    pool : SelectedPairs
        Pairs for humans: the uncertain pairs without a judgment, with π = 1, and a random share of
        the others. Their sides are in random order; rows of one name are one pair.
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
    """Return an ensemble's uncertainty of each pair in nats.

    Parameters
    ----------
    comparison : Comparison
    uncertainty : {"epistemic", "total", "aleatoric", "predictive"}
        Mutual information of the members, entropy of their mixture, mean of their entropies, or
        H[p] of the calibrated probability, which a single member has, too.

    Returns
    -------
    ndarray, shape (n_pairs,)
        ln 2, the maximum, for pairs that fewer than two members scored.

    Raises
    ------
    OptionError
        If the name is unknown.
    OneMemberError
        If there is one member, which has only a predictive uncertainty.
    """
    if uncertainty not in UNCERTAINTIES:
        raise OptionError(f"uncertainty must be one of {UNCERTAINTIES}, not {uncertainty!r}")
    if uncertainty == "predictive":
        p = comparison.probability
        return np.asarray(entr(p) + entr(1.0 - p), dtype=np.float64)
    nats: Floats = getattr(comparison.uncertainty, uncertainty)
    return unknown_as_most(nats)


def threshold_for_share(uncertainty: ArrayLike, share: float) -> float:
    """Return the lowest threshold that at most a share of such pairs reaches.

    Parameters
    ----------
    uncertainty : array_like, shape (n_pairs,)
        Uncertainty in nats of pairs like those to be routed.
    share : float
        Maximum share of pairs for the judge, in [0, 1].

    Returns
    -------
    float
        In nats. Pairs of equal uncertainty are routed together or not at all.

    Raises
    ------
    OptionError
        If the share is out of range.
    DataError
        If there is no pair.
    """
    values = np.sort(np.asarray(uncertainty, dtype=np.float64))[::-1]
    if not 0 <= share <= 1:
        raise OptionError(f"share must lie in [0, 1], not {share!r}")
    if len(values) == 0:
        raise DataError("a threshold needs the uncertainty of at least one pair")
    if not np.isfinite(values).all():
        raise NonFiniteScoreError(
            "a threshold needs finite uncertainties; some are NaN or infinite"
        )
    # 1e-9: share · n may round to just below a whole number.
    k = int(share * len(values) + 1e-9)
    if k == len(values):
        return float(values[-1])
    # The lowest value above the first one that exceeds the share.
    above = values[values > values[k]]
    # All equal and too many: no pair reaches a threshold above them.
    return float(above[-1]) if len(above) else float(np.nextafter(values[0], np.inf))


def choose_threshold(
    ensemble: RewardEnsemble,
    pairs: Preferences,
    *,
    share: float,
    uncertainty: str = "epistemic",
    progress: Progress = silent,
) -> float:
    """Return the threshold at which at most a share of such pairs goes to the judge.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated.
    pairs : Preferences
        Pairs like those to be routed; their verdicts are ignored.
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
    comparison = _compare(ensemble, pairs, progress)
    return threshold_for_share(pair_uncertainty(comparison, uncertainty), share)


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
    """Compare pairs, and ask a judge about those where the ensemble is uncertain.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Calibrated.
    pairs : Preferences
        Pairs from `read_comparisons`; their verdicts are ignored.
    threshold : float, optional
        In nats; pairs of at least this uncertainty are routed, see `choose_threshold`.
    share : float, optional
        Instead of a threshold: route at most this share of these pairs.
    judge : Comparator, optional
        Such as a `JudgeComparator` or a larger ensemble. Without one, all routed pairs go to the
        human pool.
    uncertainty : {"epistemic", "total", "aleatoric", "predictive"}
        See `pair_uncertainty`.
    budget : int, optional
        Maximum number of pairs for the judge; the most uncertain ones are chosen.
    final : {"judge", "pooled"}
        Probability of a judged pair: the judge's, or that of the mean of both logits [2]_.
    audit_share : float
        In [0, 1], the probability with which any other pair joins the pool, so that weighted human
        judgments estimate the quality on all pairs, and that of the judge.
    seed : int
        Seed of the audit and of the order of the pool's sides.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Routed

    Raises
    ------
    OptionError
        If an option is out of range.
    DataError
        If there is no pair, or two different pairs have the same id.
    NotCalibratedError
        If the ensemble is not calibrated.
    RemoteUnavailableError, RemoteRefusalError
        If the judge cannot be reached at all.
    """
    _check(threshold, share, budget, final, audit_share)
    if len(pairs) == 0:
        raise DataError(f"{pairs.source} has no pair to route")
    names = pair_names(pairs)  # bad ids raise before the judge is asked
    comparison = _compare(ensemble, pairs, progress)
    value = pair_uncertainty(comparison, uncertainty)
    if threshold is None:
        threshold = threshold_for_share(value, 0.0 if share is None else share)
    uncertain = np.flatnonzero(value >= threshold)
    rows = np.empty(0, dtype=np.int64)
    if judge is not None:
        # With a budget the most uncertain pairs go first.
        ranked = uncertain[np.argsort(-value[uncertain], kind="stable")]
        # Back in the order of the pairs.
        rows = np.sort(ranked[: len(ranked) if budget is None else budget])
    by_judge, failures, usage = _ask(judge, pairs, rows)
    judged = np.isfinite(by_judge)
    p = comparison.probability.copy()
    if final == "judge":
        p[judged] = by_judge[judged]
    else:
        sides = (np.clip(q[judged], _NEAR, 1 - _NEAR) for q in (p, by_judge))
        # Mean of the two logits: each side's doubt counts.
        p[judged] = expit(sum(map(logit, sides)) / 2)
    pending = np.zeros(len(pairs), dtype=np.bool_)
    # Pairs that the judge could not answer go to humans.
    pending[uncertain] = True
    pool = pairs_for_humans(
        pairs,
        names,
        pending & ~judged,
        audit_share=audit_share,
        seed=seed,
        strategy=f"route-{uncertainty}",
    )
    routes: tuple[Route, ...] = tuple("judge" if by else "ensemble" for by in judged)
    saving = Saving(len(pairs), len(rows), usage)
    return Routed(p, routes, value, threshold, comparison, by_judge, failures, pool, saving)


def _check(
    threshold: float | None,
    share: float | None,
    budget: int | None,
    final: str,
    audit_share: float,
) -> None:
    if (threshold is None) == (share is None):
        raise OptionError("pass either threshold or share")
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
    """Return the judge's probabilities of these rows, NaN elsewhere, failures and usage."""
    by_judge = np.full(len(pairs), np.nan)
    failures: list[str | None] = [None] * len(pairs)
    if judge is None or len(rows) == 0:
        return by_judge, tuple(failures), Usage()
    chosen = pairs.take(rows)
    verdicts: Compared
    if isinstance(judge, RewardEnsemble):
        verdicts = _compare(judge, chosen, silent)
    # An ensemble as judge takes references and subsets too.
    else:
        verdicts = judge.compare(
            [pair.prompt for pair in chosen],
            [pair.chosen for pair in chosen],
            [pair.rejected for pair in chosen],
        )
    by_judge[rows] = verdicts.probability
    errors: Mapping[int, Exception] = {}
    usage = Usage(calls=len(rows))
    if isinstance(verdicts, JudgeVerdicts):
        errors, usage = verdicts.errors, verdicts.usage
    for i, row in enumerate(rows.tolist()):
        if np.isnan(by_judge[row]):
            failures[row] = str(errors[i]) if i in errors else "the judge has no judgment"
    return by_judge, tuple(failures), usage
