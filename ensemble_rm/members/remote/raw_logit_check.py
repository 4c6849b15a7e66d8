"""Checks whether a server returns raw logits, by the scores of a few probes.

A sigmoid keeps every score in [0, 1], and a softmax over one logit is always 1. Probes of very
different quality therefore need different scores, and some outside [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample

RawLogitCheck: TypeAlias = Literal["warn", "error", "off"]
RAW_LOGIT_CHECKS = ("warn", "error", "off")

_QUESTION = "How do I boil an egg?"
PROBES: tuple[Sample, ...] = (
    Sample(_QUESTION, "Put it in boiling water for seven minutes, then cool it under the tap."),
    Sample(_QUESTION, "asdf qwer zxcv uiop"),
    Sample(_QUESTION, "I don't care. Go away and stop wasting my time, you idiot."),
    Sample("What is 17 + 25?", "17 + 25 = 42."),
    Sample("What is 17 + 25?", "17 + 25 is 3, because cats are made of glass."),
    Sample("Write one sentence about the sea.", "The sea keeps its own slow time."),
    Sample("Write one sentence about the sea.", "no " * 120),
    Sample("Thank you for your help!", "You are welcome. Is there anything else?"),
)
"""Correct, wrong, rude, meaningless, short and long answers: no reward model scores them alike."""

# Share of the probes' range. In low precision a score depends a little on its batch, but less.
_DRIFT = 0.1


@dataclass(frozen=True, slots=True)
class RawLogitReport:
    """Result of the probes.

    Attributes
    ----------
    scores : tuple of float
        Scores of the probes, in order.
    problems : tuple of str
        What is wrong; empty if the scores may be raw logits.
    """

    scores: tuple[float, ...]
    problems: tuple[str, ...]


def probe(score: Callable[[Sequence[Sample]], NDArray[np.float64]]) -> RawLogitReport:
    """Score the probes twice, the second time in reverse order.

    Parameters
    ----------
    score : callable
        Samples → (n_samples,) scores, NaN where a sample has none.
    """
    return compare_orders(score(PROBES), score(PROBES[::-1])[::-1])


def compare_orders(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> RawLogitReport:
    """Check the probes' scores of a request in order and of one in reverse order.

    Parameters
    ----------
    forward, backward : ndarray, shape (n_probes,)
        Both in the order of the probes; NaN where a probe has no score.
    """
    return RawLogitReport(tuple(forward.tolist()), tuple(_problems(forward, backward)))


def _problems(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> list[str]:
    missing = np.isnan(forward) | np.isnan(backward)
    if missing.any():
        return [f"{int(missing.sum())} of {len(forward)} probes have no score"]
    low, high = float(forward.min()), float(forward.max())
    if math.isclose(low, high, rel_tol=1e-6, abs_tol=1e-9):
        why = "; a softmax over one logit is always 1" if math.isclose(high, 1.0) else ""
        return [f"all {len(forward)} probes score {high:g}{why}"]
    problems = []
    if low >= 0 and high <= 1:
        problems.append(
            f"all {len(forward)} probes score within [0, 1], from {low:.4g} to {high:.4g}: a "
            "server probably applies a sigmoid"
        )
    drift = float(np.abs(forward - backward).max())
    if drift > _DRIFT * (high - low):
        problems.append(
            f"a probe's score changed by {drift:.4g} in a request in reverse order, while all "
            f"scores span {high - low:.4g}: scores are in the wrong order, or depend on the batch"
        )
    return problems
