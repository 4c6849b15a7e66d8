"""Measures of a call's rewards: disagreement, correlation, out-of-range scores, length slope."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import OptionError
from ensemble_rm.uncertainty.disagreement import margin_correlation, mean_correlation

RANGE = (0.005, 0.995)  # quantiles of the reference scores; 1 % of them lie outside


def prompt_groups(prompts: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return the number of each row's prompt in order of appearance, shape (n_samples,)."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(p, len(numbers)) for p in prompts], dtype=np.int64)


def reference_range(evidence: ScoredPairs) -> Floats:
    """Return the range of 99 % of each member's scores of the judged completions.

    Parameters
    ----------
    evidence : ScoredPairs
        Judgments that the ensemble was calibrated on.

    Returns
    -------
    ndarray, shape (2, n_members)
        Low and high, in normalised units, over the completions that the member scored.
    """
    scores = np.concatenate([evidence.first, evidence.second])
    # Both sides of every pair, shape (2·n_pairs, n_members); quantiles by member.
    return np.asarray(np.nanquantile(scores, RANGE, axis=0), dtype=np.float64)


def outside_range(members: Floats, span: Floats) -> NDArray[np.bool_]:
    """Return which scores are outside their member's reference range, shape (n, n_members)."""
    outside: NDArray[np.bool_] = (members < span[0]) | (members > span[1])
    return outside


def within_prompts(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Subtract from each row the mean of its prompt's rows; shape as given."""
    counts = np.bincount(groups)
    sums = np.zeros((len(counts), *values.shape[1:]))
    # add.at adds every row of a prompt; fancy assignment would keep only the last.
    np.add.at(sums, groups, values)
    # (groups, …) by transposing: counts are divided along the first axis for any shape.
    return values - (sums.T / np.maximum(counts, 1)).T[groups]


def disagreement(members: Floats, groups: NDArray[np.int64]) -> float:
    """Measure how much the members disagree on the order of a prompt's completions.

    Parameters
    ----------
    members : ndarray, shape (n_samples, n_members)
        Finite normalised scores.
    groups : ndarray of int, shape (n_samples,)
        Prompt of each.

    Returns
    -------
    float
        Mean share of outvoted members over all pairs of completions of one prompt; a member's tie
        counts half for each side. 0 is unanimous, ½ evenly split; NaN if no prompt has a pair.
    """
    outvoted, pairs = 0.0, 0
    for group in range(int(groups.max(initial=-1)) + 1):
        rows = members[groups == group]
        i, j = np.triu_indices(len(rows), 1)
        # Share of members that prefer i over j; ties count ½, shape (n_pairs,).
        share = (0.5 + 0.5 * np.sign(rows[i] - rows[j])).mean(axis=1)
        # The smaller side of the vote is outvoted.
        outvoted += float(np.minimum(share, 1 - share).sum())
        pairs += len(share)
    return outvoted / pairs if pairs else float("nan")


def within_correlation(members: Floats, groups: NDArray[np.int64]) -> float:
    """Mean correlation between members' scores within prompts; NaN where it is undefined."""
    centred = within_prompts(members, groups)
    try:
        return mean_correlation(margin_correlation(centred))
    except OptionError:  # a member that scores all completions of each prompt alike
        return float("nan")


def length_slope(reward: Floats, log_length: Floats, groups: NDArray[np.int64]) -> float:
    """Slope of reward on log length within prompts, by least squares.

    Length is the first thing that policies exploit: if the slope rises during a run, the policy is
    rewarded for more words.

    Parameters
    ----------
    reward : ndarray, shape (n_samples,)
        Normalised units.
    log_length : ndarray, shape (n_samples,)
        Natural logarithm of each completion's length.
    groups : ndarray of int, shape (n_samples,)
        Prompt of each.

    Returns
    -------
    float
        Normalised units per unit of log length; NaN if lengths do not vary within any prompt.
    """
    x, y = within_prompts(log_length, groups), within_prompts(reward, groups)
    # A slope needs completions of different lengths within a prompt.
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 1e-12 * len(x) else float("nan")


def length_controlled(reward: Floats, log_length: Floats, slope: float, reference: float) -> Floats:
    """Subtract slope · (log length − reference); shape (n_samples,)."""
    return reward - slope * (log_length - reference)
