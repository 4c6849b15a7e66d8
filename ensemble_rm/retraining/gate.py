"""Whether retrained members may take the incumbent's place: NLL and accuracy on the newest prompts.

The same comparison as a recalibration's, on the same judgments, clustered by prompt; the incumbent
is given a temperature of the same judgments as the candidate, so that what passes is more than a
recalibration could do. Knows margins and verdicts; knows nothing of members or training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scipy.special import expit
from scipy.stats import t as student

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.metrics import agreement
from ensemble_rm.recalibration.gate import Gate, clustered_mean, judge_candidate, losses

Answer: TypeAlias = Literal["publish", "keep", "too few"]


@dataclass(frozen=True, slots=True)
class AccuracyGate:
    """What the gate found of accuracy.

    Attributes
    ----------
    passed : bool
        Whether a fall by more than delta is excluded.
    before, after : float
        Of the incumbent and the candidate, in [0, 1]; a tie or a split vote earns its share.
    difference : float
        After minus before; above 0 it is better.
    se : float
        Of the difference, over prompts.
    lower : float
        One-sided lower bound of the difference.
    delta, level : float
        The fall that has to be excluded, and at which confidence.
    """

    passed: bool
    before: float
    after: float
    difference: float
    se: float
    lower: float
    delta: float
    level: float


@dataclass(frozen=True)
class RetrainingGate:
    """What the gate found.

    Attributes
    ----------
    answer : {"publish", "keep", "too few"}
        Too few where the candidate looks better, and more judgments could show it.
    reason : str
        Why, in words.
    nll : Gate
    accuracy : AccuracyGate
    needed : int, optional
        About how many judgments the gate would need, if they said on average what these do.
    """

    answer: Answer
    reason: str
    nll: Gate
    accuracy: AccuracyGate
    needed: int | None = None


def gate_members(
    incumbent: ScoredPairs,
    candidate: ScoredPairs,
    aggregator: Aggregator,
    *,
    temperatures: tuple[float, float],
    delta: float,
    delta_accuracy: float,
    level: float = 0.95,
) -> RetrainingGate:
    """Compare two ensembles on the same judged pairs.

    The candidate is published if its NLL is lower, a rise of more than `delta` can be excluded, and
    a fall of accuracy by more than `delta_accuracy` can be excluded.

    Parameters
    ----------
    incumbent, candidate : ScoredPairs
        The gate's pairs by the one and by the other.
    aggregator : Aggregator
        Of both.
    temperatures : tuple of float
        Theirs; infinity makes every probability ½.
    delta : float
        Nats a judgment, > 0.
    delta_accuracy : float
        In (0, 1).
    level : float
        Of the one-sided bounds.

    Returns
    -------
    RetrainingGate
    """
    pairs = (incumbent, candidate)
    margins = [some.margins(aggregator) for some in pairs]
    y, w, groups = incumbent.targets, incumbent.weights, incumbent.groups
    before, after = (losses(x, y, t) for x, t in zip(margins, temperatures, strict=True))
    nll = judge_candidate(before, after, weights=w, groups=groups, delta=delta, level=level)
    hits = [agreement(expit(x), y) for x in margins]
    accuracy = _accuracy(hits[0], hits[1], w, groups, delta=delta_accuracy, level=level)
    if nll.passed and accuracy.passed:
        reason = f"{nll.reason}; {_said(accuracy)}"
        return RetrainingGate("publish", reason, nll, accuracy)
    if nll.difference >= 0:
        reason = f"the retrained members are no better on the newest prompts ({_nats(nll)})"
        return RetrainingGate("keep", reason, nll, accuracy)
    reach = float(student.ppf(level, max(nll.prompts - 1, 1)))
    # Each bound holds once its standard error is small enough for the difference that was seen.
    shares = [
        _shrink(nll.difference, nll.se, nll.delta, reach),
        _shrink(-accuracy.difference, accuracy.se, accuracy.delta, reach),
    ]
    if not all(map(math.isfinite, shares)):
        reason = f"{_nats(nll)}, but the accuracy falls: {_said(accuracy)}"
        return RetrainingGate("keep", reason, nll, accuracy)
    needed = math.ceil(nll.judgments * max(shares))
    reason = (
        f"{_nats(nll)}, and {_said(accuracy)}: more judgments are needed, about {needed} on "
        f"prompts of the gate, which had {nll.judgments}"
    )
    return RetrainingGate("too few", reason, nll, accuracy, needed)


def _accuracy(
    before: Floats, after: Floats, weights: Floats, groups: object, *, delta: float, level: float
) -> AccuracyGate:
    difference, se, prompts = clustered_mean(after - before, weights, groups)  # type: ignore[arg-type]
    lower = difference - (float(student.ppf(level, max(prompts - 1, 1))) * se if se > 0 else 0.0)
    total = float(weights.sum())
    return AccuracyGate(
        lower >= -delta,
        float(weights @ before) / total,
        float(weights @ after) / total,
        difference,
        se,
        lower,
        delta,
        level,
    )


def _shrink(rise: float, se: float, delta: float, reach: float) -> float:
    """Return how many times the judgments it takes to exclude a rise above delta; ∞ if none can."""
    if rise + reach * se <= delta:
        return 1.0
    return (reach * se / (delta - rise)) ** 2 if rise < delta else math.inf


def _nats(nll: Gate) -> str:
    word = "falls" if nll.difference < 0 else "rises"
    return f"NLL {word} by {abs(nll.difference):.5f} nats, at most {nll.upper:+.5f}"


def _said(accuracy: AccuracyGate) -> str:
    return (
        f"accuracy {accuracy.before:.3f} → {accuracy.after:.3f}, a fall beyond "
        f"{accuracy.delta:g} {'is' if accuracy.passed else 'is not'} excluded"
    )
