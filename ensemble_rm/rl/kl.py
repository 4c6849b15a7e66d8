"""A KL penalty for training loops without one: estimators, reward shaping, controllers.

If the trainer has a penalty, such as TRL's `beta`, use that one instead.

References
----------
.. [1] Ziegler et al. 2019, arXiv 1909.08593: the penalty β·KL, and a proportional controller of β.
.. [2] Schulman 2020, "Approximating KL divergence": the estimators k1 and k3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import NonFiniteScoreError, OptionError

Estimator: TypeAlias = Literal["k1", "k3"]


def sequence_kl(
    policy: ArrayLike, reference: ArrayLike, mask: ArrayLike, *, estimator: Estimator = "k1"
) -> Floats:
    """Estimate KL(policy ‖ reference) of each completion, in nats, from samples of the policy [2]_.

    Parameters
    ----------
    policy, reference : array_like, shape (n_samples, n_tokens)
        Log-probability of each sampled token.
    mask : array_like, shape (n_samples, n_tokens)
        Nonzero at the completion's tokens; other positions are ignored.
    estimator : {"k1", "k3"}
        "k1": Σ log(π/π_ref), unbiased, of either sign. "k3": Σ (π_ref/π − 1 − log(π_ref/π)), never
        negative, with lower variance, unbiased for each token given those before it.

    Returns
    -------
    ndarray, shape (n_samples,)
        The mean over samples estimates the KL.

    Raises
    ------
    OptionError
        If shapes differ, or `estimator` is neither of the two.
    NonFiniteScoreError
        If a log-probability of a completion's token is not finite.
    """
    if estimator not in ("k1", "k3"):
        raise OptionError(f"estimator must be 'k1' or 'k3', not {estimator!r}")
    p, q = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    kept: NDArray[np.bool_] = np.asarray(mask) != 0
    if not p.shape == q.shape == kept.shape or p.ndim != 2:
        raise OptionError(
            f"log-probabilities and mask must have one shape (n_samples, n_tokens), not {p.shape}, "
            f"{q.shape} and {kept.shape}"
        )
    # Padding may hold −inf, and −inf − (−inf) is NaN; so both are masked before the difference.
    log_ratio = np.where(kept, p, 0.0) - np.where(kept, q, 0.0)
    if not np.isfinite(log_ratio).all():
        row = int(np.argwhere(~np.isfinite(log_ratio))[0, 0])
        raise NonFiniteScoreError(f"sample {row} has a log-probability that is NaN or infinite")
    # k3 = (r − 1) − log r with r = q/p: unbiased and never negative; expm1 keeps small ratios
    # exact.
    terms = log_ratio if estimator == "k1" else np.expm1(-log_ratio) + log_ratio
    return np.asarray(terms.sum(axis=1), dtype=np.float64)


def shape_rewards(rewards: ArrayLike, kl: ArrayLike, *, beta: float) -> Floats:
    """Subtract the penalty: r − β·KL of each completion [1]_.

    Parameters
    ----------
    rewards : array_like, shape (n_samples,)
        In normalised units; NaN (a failed sample) stays NaN.
    kl : array_like, shape (n_samples,)
        Nats, as `sequence_kl` returns it.
    beta : float
        ≥ 0, normalised units per nat.

    Returns
    -------
    ndarray, shape (n_samples,)
        The shaped rewards.

    Raises
    ------
    OptionError
        If shapes differ, or β is negative or not finite.
    """
    r, d = np.asarray(rewards, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if r.shape != d.shape:
        raise OptionError(f"rewards and KL must have one shape, not {r.shape} and {d.shape}")
    _check("beta", beta, beta >= 0, "≥ 0")
    return np.asarray(r - beta * d, dtype=np.float64)


class KLController(Protocol):
    """Interface of the penalty's coefficient, which may change from step to step."""

    @property
    def beta(self) -> float:
        """Normalised units per nat."""
        ...

    def update(self, kl: float) -> KLController:
        """Return the controller for the next step, after a step with mean KL `kl`."""
        ...


@dataclass(frozen=True)
class FixedKL:
    """A constant penalty.

    Attributes
    ----------
    beta : float
        ≥ 0, normalised units per nat.
    """

    beta: float

    def __post_init__(self) -> None:
        _check("beta", self.beta, self.beta >= 0, "≥ 0")

    def update(self, kl: float) -> FixedKL:
        """Return the same controller.

        Parameters
        ----------
        kl : float
            Mean KL of the step, nats.
        """
        _check("kl", kl, math.isfinite(kl), "finite")
        return self


@dataclass(frozen=True)
class AdaptiveKL:
    """A penalty that keeps the KL near a target, by proportional control in log β [1]_.

    β ← β·(1 + gain·e), e = (KL − target)/target, clipped to [−0.2, 0.2].

    Attributes
    ----------
    beta : float
        > 0, normalised units per nat, for the next step.
    target : float
        > 0, nats.
    gain : float
        In (0, 5); 0.1 in the paper. At 5 or more, one step could make β negative.
    """

    beta: float
    target: float
    gain: float = 0.1

    def __post_init__(self) -> None:
        _check("beta", self.beta, self.beta > 0, "> 0 (a factor cannot change 0)")
        _check("target", self.target, self.target > 0, "> 0")
        _check("gain", self.gain, 0 < self.gain < 5, "in (0, 5)")

    def update(self, kl: float) -> AdaptiveKL:
        """Return the controller for the next step.

        Parameters
        ----------
        kl : float
            Mean KL of the step, nats.
        """
        _check("kl", kl, math.isfinite(kl), "finite")
        # Clipped, as in the paper: one wild step must not change β by more than gain/5.
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + self.gain * error))


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid or not math.isfinite(value):
        raise OptionError(f"{name} must be {expected}, not {value!r}")
