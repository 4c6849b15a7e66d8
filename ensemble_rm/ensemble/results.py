"""Results of an ensemble: scores, comparisons, rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.ties import TIE
from ensemble_rm.members.scorer import Truncation
from ensemble_rm.scoring.pipeline import Errors, RawScores
from ensemble_rm.uncertainty.disagreement import PairUncertainty, member_std, split_uncertainty


@dataclass(frozen=True, eq=False)
class Scores:
    """An ensemble's scores of samples, in their order.

    Attributes
    ----------
    names : tuple of str
        The members.
    members : ndarray, shape (n_samples, n_members)
        Normalised scores.
    raw : ndarray, shape (n_samples, n_members)
        As the members returned them, each in its own unit.
    reward : ndarray, shape (n_samples,)
        Aggregated, in normalised units.
    truncation : Truncation
        Which samples were cut, by any member that tokenises here; a baseline's references are
        samples too.
    errors : mapping of (int, str or None) to Exception
        By (row, member), why a score is missing. Under ``on_error="record"``, every row without a
        reward is here; its member is None where several members, or their aggregation, failed.
        Under both policies, it holds what members on servers say of samples without a score.
    distance : ndarray, shape (n_samples,), optional
        To the training inputs, where it was asked for.

    Examples
    --------
    >>> from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
    >>> from ensemble_rm.aggregation import mean
    >>> from ensemble_rm.calibration import Normaliser
    >>> inverse = FunctionScorer("inverse", lambda sample: 1 / len(sample.completion))
    >>> ensemble = RewardEnsemble((inverse,), Normaliser.identity(1), mean())
    >>> scores = ensemble.score([Sample("Why?", "Yes."), Sample("Why?", "")], on_error="record")
    >>> scores.reward
    array([0.25,  nan])
    >>> scores.failed
    {1: ZeroDivisionError('division by zero')}
    """

    names: tuple[str, ...]
    members: Floats
    raw: Floats
    reward: Floats
    truncation: Truncation
    errors: Errors = field(default_factory=dict)
    distance: Floats | None = None

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, rows: slice) -> Scores:
        """Return the scores of consecutive samples."""
        start, stop, _ = rows.indices(len(self))
        return replace(
            self,
            members=self.members[start:stop],
            raw=self.raw[start:stop],
            reward=self.reward[start:stop],
            truncation=self.truncation[start:stop],
            errors={
                (row - start, member): error
                for (row, member), error in self.errors.items()
                if start <= row < stop
            },
            distance=None if self.distance is None else self.distance[start:stop],
        )

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Return the scores of all parts, in their order: at least one, of the same members."""
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        # The distance of only some parts would not line up with the rows, so all have it or none.
        far = [part.distance for part in parts if part.distance is not None]
        return cls(
            parts[0].names,
            np.concatenate([part.members for part in parts]),
            np.concatenate([part.raw for part in parts]),
            np.concatenate([part.reward for part in parts]),
            Truncation.join([part.truncation for part in parts]),
            {
                (start + row, member): error
                for start, part in zip(starts, parts, strict=False)
                for (row, member), error in part.errors.items()
            },
            np.concatenate(far) if len(far) == len(parts) else None,
        )

    @cached_property
    def failed(self) -> Mapping[int, Exception]:
        """By row, why there is no reward; rows with a reward are not in it."""
        lost: dict[int, Exception] = {}
        for (row, member), error in self.errors.items():
            # The failure of the whole row is more specific than one missing member.
            if np.isnan(self.reward[row]) and (row not in lost or member is None):
                lost[row] = error
        return dict(sorted(lost.items()))

    @property
    def std(self) -> Floats:
        """Spread of the members that scored (ddof 1), shape (n_samples,); NaN of fewer than two.

        An ensemble of one member is an error.
        """
        return member_std(self.members, nan="omit")


def aggregate_recorded(
    names: tuple[str, ...], result: RawScores, members: Floats, aggregator: Aggregator
) -> Scores:
    """Aggregate each row that has enough scores; record why the others have no reward.

    Parameters
    ----------
    names : tuple of str
        The members.
    result : RawScores
        What the members returned.
    members : ndarray, shape (n_samples, n_members)
        Normalised scores.
    aggregator : Aggregator

    Returns
    -------
    Scores
        Rows without a reward are NaN, and their reason is in `errors`.
    """
    # Rows of failed samples have no scores to aggregate; NaN stands for no reward.
    reward, errors = np.full(len(members), np.nan), dict(result.errors)
    # One call for all rows is the common case; one call per row only after a failure.
    rows = np.flatnonzero(~result.failed)
    try:
        reward[rows] = aggregator(members[rows])
    except Exception:  # noqa: BLE001 - of which rows, only each row by itself can say
        for row in rows:
            try:
                reward[row] = aggregator(members[row : row + 1])[0]
            except Exception as error:  # noqa: BLE001 - recorded
                errors[int(row), None] = error
    lost = np.isnan(reward)
    # Copies: the arguments stay as the pipeline returned them.
    raw, members = result.raw.copy(), members.copy()
    # A row without a reward shows no scores either, so that nobody averages half a row.
    raw[lost] = members[lost] = np.nan
    far = result.distance
    return Scores(names, members, raw, reward, result.truncation, errors, far)


@dataclass(frozen=True, eq=False)
class Comparison:
    """An ensemble's comparison of pairs of completions, in their order.

    Attributes
    ----------
    probability : ndarray, shape (n_pairs,)
        Calibrated P(first is preferred): σ(margin/T), or the value of the calibration's curve.
    margin : ndarray, shape (n_pairs,)
        Aggregated reward of the first minus that of the second, in normalised units.
    member_margins : ndarray, shape (n_pairs, n_members)
        Each member's.
    mixture_temperature : float
        T_mix of the members' mixture.
    truncation : Truncation
        Which of the 2 · n_pairs completions were cut: rows 2i and 2i + 1 are the sides of pair i.
    outcomes : ndarray, shape (n_pairs, 3), optional
        P(first), P(tie), P(second) by the calibration's tie model, where it has one; `probability`
        counts a tie as half for each side.
    """

    probability: Floats
    margin: Floats
    member_margins: Floats
    mixture_temperature: float
    truncation: Truncation
    outcomes: Floats | None = None

    @property
    def tie_probability(self) -> Floats | None:
        """P(tie), shape (n_pairs,); None where the calibration models no ties."""
        return None if self.outcomes is None else self.outcomes[:, TIE]

    @cached_property
    def uncertainty(self) -> PairUncertainty:
        """The split of total into aleatoric and epistemic, on the mixture of those that scored.

        NaN of fewer than two; an ensemble of one member is an error.
        """
        return split_uncertainty(
            self.member_margins, mixture_temperature=self.mixture_temperature, nan="omit"
        )

    @property
    def mixture_probability(self) -> Floats:
        """Mean over the members of σ(Δᵢ/T_mix), the input of the split; shape (n_pairs,)."""
        return self.uncertainty.mixture_probability

    @property
    def total(self) -> Floats:
        """Entropy of the mixture, nats; shape (n_pairs,)."""
        return self.uncertainty.total

    @property
    def aleatoric(self) -> Floats:
        """Mean entropy of the members, nats; shape (n_pairs,)."""
        return self.uncertainty.aleatoric

    @property
    def epistemic(self) -> Floats:
        """Mutual information of verdict and member, nats; shape (n_pairs,)."""
        return self.uncertainty.epistemic


def compare_scored(
    calibration: Calibration,
    reward: Floats,
    members: Floats,
    truncation: Truncation,
    *,
    subsets: Sequence[str | None] | None = None,
) -> Comparison:
    """Compare completions that have scores: rows 2i and 2i + 1 are the sides of pair i.

    Parameters
    ----------
    calibration : Calibration
        Of the aggregator that made the rewards.
    reward : ndarray, shape (2 · n_pairs,)
    members : ndarray, shape (2 · n_pairs, n_members)
        Normalised scores.
    truncation : Truncation
        Of the 2 · n_pairs samples.
    subsets : sequence of (str or None), optional
        Slice of each pair.
    """
    # Sides alternate, (n_pairs, 2) flattened: even rows are the first side.
    margin = reward[::2] - reward[1::2]
    return Comparison(
        calibration.probability(margin, subsets=subsets),
        margin,
        members[::2] - members[1::2],
        # T_mix, not T: the members' mixture is flatter than the aggregated margin.
        calibration.mixture_temperature,
        truncation,
        calibration.outcomes(margin),
    )


@dataclass(frozen=True, eq=False)
class Ranking:
    """Completions of one prompt, best first.

    Attributes
    ----------
    order : ndarray of int, shape (n_completions,)
        Positions in the given list, highest reward first; ties keep their order.
    reward : ndarray, shape (n_completions,)
        In the order given.
    truncation : Truncation
        Which completions were cut, in the order given.
    """

    order: NDArray[np.int64]
    reward: Floats
    truncation: Truncation
