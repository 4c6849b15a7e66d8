"""Do a server's scores look like raw logits? A few probes whose scores must differ and go far.

A sigmoid keeps every score in [0, 1]; a softmax over one logit makes each of them 1. Knows texts
and numbers; knows nothing of servers.
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
"""Answers that are right, wrong, rude, empty of sense, short and long: no scorer likes them all."""

_DRIFT = 0.1  # of the probes' range; low precision moves a score with its batch, but not so far


@dataclass(frozen=True, slots=True)
class RawLogitReport:
    """Result of the probes.

    Attributes
    ----------
    scores : tuple of float
        Of the probes, in their order.
    problems : tuple of str
        What is wrong; none where the scores can be raw logits.
    """

    scores: tuple[float, ...]
    problems: tuple[str, ...]


def probe(score: Callable[[Sequence[Sample]], NDArray[np.float64]]) -> RawLogitReport:
    """Score the probes, and again in reverse.

    Parameters
    ----------
    score : callable
        Samples → (n_samples,) scores, NaN where there is none.
    """
    return compare_orders(score(PROBES), score(PROBES[::-1])[::-1])


def compare_orders(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> RawLogitReport:
    """Say what two sets of the probes' scores tell: asked in their order, and asked in reverse.

    Parameters
    ----------
    forward, backward : ndarray, shape (n_probes,)
        Both in the order of the probes; NaN where there is no score.
    """
    return RawLogitReport(tuple(forward.tolist()), tuple(_problems(forward, backward)))


def _problems(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> list[str]:
    missing = np.isnan(forward) | np.isnan(backward)
    if missing.any():
        return [f"{int(missing.sum())} of {len(forward)} probes have no score"]
    low, high = float(forward.min()), float(forward.max())
    if math.isclose(low, high, rel_tol=1e-6, abs_tol=1e-9):
        why = "; a softmax over one logit is 1, always" if math.isclose(high, 1.0) else ""
        return [f"all {len(forward)} probes score {high:g}{why}"]
    found = []
    if low >= 0 and high <= 1:
        found.append(
            f"all {len(forward)} probes score within [0, 1], from {low:.4g} to {high:.4g}: a "
            "sigmoid is likely between the model and its answer"
        )
    drift = float(np.abs(forward - backward).max())
    if drift > _DRIFT * (high - low):
        found.append(
            f"a probe's score moved by {drift:.4g} when the order of the request was turned, of a "
            f"range of {high - low:.4g}: scores belong to other samples, or depend on neighbours"
        )
    return found
