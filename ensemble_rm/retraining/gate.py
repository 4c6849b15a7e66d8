"""Whether retrained members may replace the incumbent: NLL and accuracy on the newest prompts.

The same comparison as in a recalibration, on the same judgments, clustered by prompt. Both
ensembles get a temperature from the same judgments, so that a candidate that passes achieves more
than a recalibration could. Knows margins and verdicts; knows nothing of members or training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scipy.special import expit
from scipy.stats import t as student

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.metrics import agreement
from ensemble_rm.recalibration.gate import Gate, clustered_mean, judge_candidate, losses

Answer: TypeAlias = Literal["publish", "keep", "too few"]


@dataclass(frozen=True, slots=True)
class AccuracyGate:
    """The gate's comparison of accuracy.

    Attributes
    ----------
    passed : bool
        Whether a fall by more than delta is excluded.
    before, after : float
        Of the incumbent and the candidate, in [0, 1]; a tie or a split vote counts its share.
    difference : float
        After minus before; positive if the candidate is better.
    se : float
        Standard error of the difference, over prompts.
    lower : float
        One-sided lower bound of the difference.
    delta, level : float
        The fall to exclude, and the confidence.
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
    """The result of the gate.

    Attributes
    ----------
    answer : {"publish", "keep", "too few"}
        ``"too few"``: the candidate looks better, and more judgments could show it.
    reason : str
        Why, in words.
    nll : Gate
    accuracy : AccuracyGate
    needed : int, optional
        Approximate number of judgments the gate would need, if they resembled these.
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

    The candidate passes if its NLL is lower, a rise of more than `delta` can be excluded, and a
    fall of the accuracy by more than `delta_accuracy` can be excluded.

    Parameters
    ----------
    incumbent, candidate : ScoredPairs
        The gate's pairs, scored by each ensemble.
    aggregator : Aggregator
        Of both.
    temperatures : tuple of float
        Of the incumbent and the candidate; infinity makes every probability ½.
    delta : float
        Nats per judgment, > 0.
    delta_accuracy : float
        In (0, 1).
    level : float
        Confidence of the one-sided bounds.

    Returns
    -------
    RetrainingGate
    """
    margins = [scored.margins(aggregator) for scored in (incumbent, candidate)]
    y, w, groups = incumbent.targets, incumbent.weights, incumbent.groups
    before, after = (losses(x, y, t) for x, t in zip(margins, temperatures, strict=True))
    nll = judge_candidate(before, after, weights=w, groups=groups, delta=delta, level=level)
    hits = [agreement(expit(x), y) for x in margins]
    accuracy = _accuracy(hits[0], hits[1], w, groups, delta=delta_accuracy, level=level)
    if nll.passed and accuracy.passed:
        reason = f"{nll.reason}; {_accuracy_text(accuracy)}"
        return RetrainingGate("publish", reason, nll, accuracy)
    # No number of judgments like these would show an improvement.
    if nll.difference >= 0:
        reason = f"the retrained members are not better on the newest prompts ({_nll_text(nll)})"
        return RetrainingGate("keep", reason, nll, accuracy)
    reach = float(student.ppf(level, max(nll.prompts - 1, 1)))
    # More judgments shrink the standard errors, until each bound excludes its delta.
    factors = [
        _more(nll.difference, nll.se, nll.delta, reach),
        _more(-accuracy.difference, accuracy.se, accuracy.delta, reach),
    ]
    if not all(map(math.isfinite, factors)):
        reason = f"{_nll_text(nll)}, but the accuracy falls: {_accuracy_text(accuracy)}"
        return RetrainingGate("keep", reason, nll, accuracy)
    needed = math.ceil(nll.judgments * max(factors))
    reason = (
        f"{_nll_text(nll)}, and {_accuracy_text(accuracy)}: more judgments are needed, "
        f"about {needed} on prompts of the gate, which had {nll.judgments}"
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


def _more(rise: float, se: float, delta: float, reach: float) -> float:
    """Return the factor of judgments that excludes a rise above delta; ∞ if none can."""
    if rise + reach * se <= delta:
        return 1.0
    # The standard error falls with the square root of the number of judgments.
    return (reach * se / (delta - rise)) ** 2 if rise < delta else math.inf


def _nll_text(nll: Gate) -> str:
    word = "falls" if nll.difference < 0 else "rises"
    return f"NLL {word} by {abs(nll.difference):.5f} nats, at most {nll.upper:+.5f}"


def _accuracy_text(accuracy: AccuracyGate) -> str:
    return (
        f"accuracy {accuracy.before:.3f} → {accuracy.after:.3f}, a fall beyond "
        f"{accuracy.delta:g} {'is' if accuracy.passed else 'is not'} excluded"
    )
