"""Unlabelled drift: whether scores are distributed as they were at publication.

Four statistics are compared with the version's reference, without judgments: the reward, the
members' std, the members' correlation, and the distance to the training features. The first, second
and fourth use the Kolmogorov–Smirnov distance of distributions with equal weight per prompt [1]_;
the third the difference of mean correlations, within prompts where they have several completions.
All p-values come from permuting whole prompts between then and now [2]_: samples of a prompt are
dependent, and tables of the KS statistic would report that as drift. Both sides are thinned to
equally many samples per prompt, so that prompts are exchangeable. Holm's correction covers the four
statistics, Bonferroni's the repeated checks.

A shift does not prove miscalibration, only that the inputs differ from those of the calibration.

References
----------
.. [1] Smirnov 1948; scipy.stats.ks_2samp where every prompt has one sample.
.. [2] Romano 1989, Annals of Statistics 17: permutation tests in two-sample problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.drift.multiplicity import (
    holm,
    level_of,
    permutation_p,
    permutations_for,
)
from ensemble_rm.drift.reference import Reference, ScoredSet
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.errors import OptionError
from ensemble_rm.saved_json import from_row
from ensemble_rm.uncertainty.disagreement import member_std

_CHUNK = 2_000_000  # entries of a block of permutations
NO_FEATURES = "no reference of features: no member has any (Scorer.features), or none was kept"


@dataclass(frozen=True)
class Shift:
    """One statistic, then and now.

    Attributes
    ----------
    name : str
        ``"reward"``, ``"std"``, ``"correlation"`` or ``"distance"``.
    before, now : float
        Its mean over prompts; for the correlation the mean over pairs of members.
    effect : float
        now − before, in standard deviations of the reference; for the correlation as it is.
    statistic : float
        Kolmogorov–Smirnov distance, in [0, 1]; for the correlation |effect|.
    p, adjusted : float
        By permutation of prompts, and after Holm's correction.
    alarm : bool
        adjusted ≤ the level of this check.
    """

    name: str
    before: float
    now: float
    effect: float
    statistic: float
    p: float
    adjusted: float = 1.0
    alarm: bool = False


@dataclass(frozen=True)
class UnlabelledDrift:
    """All statistics of one check.

    Attributes
    ----------
    shifts : tuple of Shift
        Those that could be tested.
    unavailable : dict of str to str
        The others, and why.
    alpha : float
        Bound on P(any alarm in all checks) if nothing shifts.
    checks : int
        Number of checks that share `alpha`.
    prompts : int
        Prompts of the batch that were used.
    permutations : int
        Number of permutations per p-value.
    """

    shifts: tuple[Shift, ...]
    unavailable: dict[str, str]
    alpha: float
    checks: int
    prompts: int
    permutations: int

    @property
    def alarm(self) -> bool:
        """Whether any statistic has shifted."""
        return any(shift.alarm for shift in self.shifts)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> UnlabelledDrift:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d, former={"looks": "checks"})


def unlabelled_drift(
    reference: Reference,
    scores: Scores,
    prompts: Sequence[str | int] | NDArray[np.int64],
    *,
    features: ArrayLike | None = None,
    distance: ArrayLike | None = None,
    alpha: float = 0.05,
    checks: int = 1,
    seed: int = 0,
) -> UnlabelledDrift:
    """Test whether a batch's scores have shifted from the reference.

    Parameters
    ----------
    reference : Reference
        Of the version that scored the batch.
    scores : Scores
        Of the batch.
    prompts : sequence of (str or int), shape (n_samples,)
        Prompt of each sample.
    features : array_like, shape (n_samples, n_features), optional
        Of the batch, where the reference has a feature space.
    distance : array_like, shape (n_samples,), optional
        Distance of the batch to the training features, if already known, instead of features.
    alpha : float
        Bound on P(any alarm in all checks) if nothing shifts.
    checks : int
        How often this version will be checked; each check has the level alpha/checks.
    seed : int
        Of the draws and permutations.

    Returns
    -------
    UnlabelledDrift

    Raises
    ------
    OptionError
        If members or lengths differ from the reference's, or an option is out of range.
    NonFiniteScoreError, DataError
        If scores are not finite, or of fewer than 20 prompts.
    """
    level = level_of(alpha, checks)
    if scores.names != reference.names:
        raise OptionError(
            f"the reference was made by members {reference.names}, not {scores.names}; use the "
            "reference of this version"
        )
    far, unavailable = _distance(reference, features, distance)
    now = ScoredSet.read(scores, prompts, far)
    per_prompt = min(int(np.bincount(one.groups).max()) for one in (reference.samples, now))
    options = {"prompts": now.prompts + reference.samples.prompts, "per_prompt": per_prompt}
    pooled = _Pooled.of(
        reference.samples.thinned(**options, seed=seed), now.thinned(**options, seed=seed + 1)
    )
    columns, reasons = _columns(pooled)
    unavailable |= reasons
    moments = None
    if "std" not in unavailable:
        moments, reason = _moments(pooled)
        unavailable |= {} if moments is not None else {"correlation": reason}
    n = permutations_for(level, len(columns) + (moments is not None))
    labels = _Labels(pooled.before, pooled.prompts, n, seed)
    found = [_ks_shift(name, x, pooled, labels) for name, x in columns.items()]
    if moments is not None:
        # The order of reports: reward, std, correlation, distance.
        found.insert(2, _correlation_shift(moments, labels))
    adjusted = holm([shift.p for shift in found])
    shifts = tuple(
        Shift(**{**asdict(one), "adjusted": float(a), "alarm": bool(a <= level)})
        for one, a in zip(found, adjusted, strict=True)
    )
    return UnlabelledDrift(shifts, unavailable, alpha, checks, now.prompts, n)


def _distance(
    reference: Reference, features: ArrayLike | None, distance: ArrayLike | None
) -> tuple[Floats | None, dict[str, str]]:
    if reference.samples.distance is None:
        return None, {"distance": NO_FEATURES}
    if distance is not None:
        return np.asarray(distance, dtype=np.float64), {}
    if reference.space is None or features is None:
        return None, {"distance": "the batch came without features"}
    return reference.space.distance(features), {}


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Samples of then and now; the prompts of then are numbered first."""

    samples: ScoredSet
    before: int
    prompts: int

    @classmethod
    def of(cls, then: ScoredSet, now: ScoredSet) -> _Pooled:
        far = None
        if then.distance is not None and now.distance is not None:
            far = np.concatenate([then.distance, now.distance])
        both = ScoredSet(
            np.concatenate([then.reward, now.reward]),
            np.concatenate([then.members, now.members]),
            np.concatenate([then.groups, now.groups + then.prompts]),
            far,
        )
        return cls(both, then.prompts, then.prompts + now.prompts)


class _Labels:
    """Permutations of the prompts between then and now, in blocks; the same on each iteration."""

    def __init__(self, before: int, prompts: int, n: int, seed: int) -> None:
        self.before, self.prompts, self.n, self.seed = before, prompts, n, seed

    @property
    def seen(self) -> Floats:
        """Weight of each prompt in now − then, (1, n_prompts): +1/n_now or −1/n_then."""
        weights = np.full((1, self.prompts), 1 / (self.prompts - self.before))
        weights[:, : self.before] = -1 / self.before
        return weights

    def blocks(self, width: int) -> Iterator[Floats]:
        """Yield permuted weights, (n, n_prompts) in blocks that suit `width` columns."""
        # A new generator each time: every statistic is tested by the same permutations.
        rng = np.random.default_rng(self.seed)
        size = max(1, _CHUNK // max(width, self.prompts))
        for begin in range(0, self.n, size):
            rows = min(size, self.n - begin)
            yield rng.permuted(np.repeat(self.seen, rows, axis=0), axis=1)


def _columns(pooled: _Pooled) -> tuple[dict[str, Floats], dict[str, str]]:
    samples = pooled.samples
    columns, unavailable = {"reward": samples.reward}, {}
    if samples.members.shape[1] > 1:
        columns["std"] = member_std(samples.members)
    else:
        reason = "a single member has no std and no correlation"
        unavailable = {"std": reason, "correlation": reason}
    if samples.distance is not None:
        columns["distance"] = samples.distance
    return columns, unavailable


def _ks_shift(name: str, x: Floats, pooled: _Pooled, labels: _Labels) -> Shift:
    groups = pooled.samples.groups
    counts = np.bincount(groups)
    order = np.argsort(x, kind="stable")
    last = np.append(np.diff(x[order]) > 0, True)  # equal values jump together
    # Each prompt has mass 1, divided among its samples; both (n_samples,).
    prompt, mass = groups[order], 1 / counts[groups[order]]

    def distance(weights: Floats) -> Floats:
        # Difference of the two distribution functions, (n_draws, n_samples).
        steps = np.cumsum(weights[:, prompt] * mass, axis=1)
        return np.asarray(np.abs(steps[:, last]).max(axis=1), dtype=np.float64)

    seen = float(distance(labels.seen)[0])
    redrawn = np.concatenate([distance(block) for block in labels.blocks(len(x))])
    means = np.bincount(groups, x) / counts
    before, now = float(means[: pooled.before].mean()), float(means[pooled.before :].mean())
    spread = float(x[groups < pooled.before].std())
    effect = (now - before) / spread if spread > 0 else 0.0
    return Shift(name, before, now, effect, seen, permutation_p(seen, redrawn))


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums of each prompt: samples (n,), scores (n, k), products of scores (n, k, k)."""

    counts: Floats
    sums: Floats
    products: Floats

    def correlation(self, weights: Floats) -> Floats:
        """Return the mean correlation, (n_draws,), of weighted prompts, (n_draws, n_prompts)."""
        k = self.sums.shape[1]
        total = (weights @ self.counts)[:, None]
        mean = weights @ self.sums / total
        flat = weights @ self.products.reshape(len(self.counts), k * k) / total
        cov = flat.reshape(-1, k, k) - mean[:, :, None] * mean[:, None, :]
        # Rounding can leave a variance at 0 or just below it.
        scale = np.sqrt(np.maximum(np.einsum("bii->bi", cov), 1e-300))
        rho = cov / (scale[:, :, None] * scale[:, None, :])
        # Mean off the diagonal, whose k entries are 1.
        return np.asarray((rho.sum(axis=(1, 2)) - k) / (k * (k - 1)), dtype=np.float64)


def _moments(pooled: _Pooled) -> tuple[_Moments | None, str]:
    """Sum each prompt's scores, about the prompt's mean where most prompts have several."""
    groups, x = pooled.samples.groups, pooled.samples.members
    counts = np.bincount(groups).astype(np.float64)
    several = counts > 1
    then, now = several[: pooled.before], several[pooled.before :]
    sums = _sum_by(groups, x)
    if min(then.mean(), now.mean()) >= 0.5:
        x = x - (sums / counts[:, None])[groups]
        # Deviations from a prompt's mean sum to 0 and have one degree of freedom less.
        sums, counts = np.zeros_like(sums), np.maximum(counts - 1, 0.0)
    k = x.shape[1]
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), k * k)
    products = _sum_by(groups, outer)
    found = _Moments(counts, sums, products.reshape(-1, k, k))
    for part in (slice(None, pooled.before), slice(pooled.before, None)):
        total = counts[part].sum()
        mean = sums[part].sum(axis=0) / total
        variance = np.einsum("pii->i", found.products[part]) / total - mean**2
        # Relative to the mean square, from which the rounding error of the difference comes.
        if not (variance > 1e-12 * (1 + mean**2)).all():
            return None, "a member's scores do not vary"
    return found, ""


def _sum_by(groups: NDArray[np.int64], columns: Floats) -> Floats:
    """Sum the rows of each prompt, (n_prompts, n_columns)."""
    summed = [np.bincount(groups, column) for column in columns.T]
    return np.asarray(np.stack(summed, axis=1), dtype=np.float64)


def _correlation_shift(moments: _Moments, labels: _Labels) -> Shift:
    def parts(weights: Floats) -> tuple[Floats, Floats]:
        then = np.asarray(weights < 0, dtype=np.float64)
        return moments.correlation(then), moments.correlation(1 - then)

    before, now = (float(part[0]) for part in parts(labels.seen))
    width = moments.products.shape[1] ** 2
    redrawn = np.concatenate([np.abs(np.subtract(*parts(b))) for b in labels.blocks(width)])
    seen = abs(now - before)
    return Shift("correlation", before, now, now - before, seen, permutation_p(seen, redrawn))
