"""Tie models: P(first), P(tie) and P(second) from a margin.

With d = Δ/T:

- Davidson [2]_: the three are in the ratio e^{d/2} : ν : e^{−d/2}, ν > 0. Given no tie, P(first) is
  σ(d). At equal rewards P(tie) = ν/(2 + ν).
- Rao and Kupper [1]_: P(first) = σ(d − log ν), P(second) = σ(−d − log ν), ν > 1 (their θ). At equal
  rewards P(tie) = (ν − 1)/(ν + 1). Given no tie, P(first) is odd about ½, but not σ(d).

Both log-likelihoods are concave in (1/T, log ν) and are maximised by Newton's method in float64,
with step halving. T here differs from that of `fit_temperature`, which counts a tie as half a vote
for each side.

References
----------
.. [1] Rao & Kupper 1967, JASA 62: ties in paired-comparison experiments.
.. [2] Davidson 1970, JASA 65: on extending the Bradley–Terry model to accommodate ties.
.. [3] Liang & Zeger 1986: the cluster-robust (sandwich) variance.
.. [4] Pratt 1981, JASA 76: the ordered logit, which [1]_ is, has a concave likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.stats import t as student

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.calibration.methods.temperature import add_up, read_judgments, require_pull
from ensemble_rm.errors import CalibrationError, OptionError, SeparableError
from ensemble_rm.saved_json import from_row

TIE_MODELS: tuple[str, ...] = ("davidson", "rao-kupper")
"""Every tie model's name."""

FIRST, TIE, SECOND = 0, 1, 2  # columns of outcomes


@dataclass(frozen=True)
class TieModel:
    """A fitted tie model.

    Attributes
    ----------
    model : str
        ``"davidson"`` or ``"rao-kupper"``.
    temperature : float
        T > 0, a divisor, in the unit of the margins.
    low, high : float
        Bounds of its interval, robust to clusters.
    log_se : float
        Standard error of log T.
    nu : float
        Davidson's ν > 0, or Rao and Kupper's ν > 1: the larger, the more ties.
    nu_low, nu_high : float
        Bounds of its interval.
    nll : float
        NLL of the three outcomes of the fitted judgments, in nats per judgment.
    judgments, prompts : int
        Number of judgments in the fit, and of their prompts.
    tie_share : float
        Share of ties among the judgments, by weight.
    """

    model: str
    temperature: float
    low: float
    high: float
    log_se: float
    nu: float
    nu_low: float
    nu_high: float
    nll: float
    judgments: int
    prompts: int
    tie_share: float

    def __post_init__(self) -> None:
        lowest = 1.0 if _known(self.model) == "rao-kupper" else 0.0
        if not (0 < self.temperature < math.inf and lowest < self.nu < math.inf):
            raise OptionError(
                f"a {self.model} model cannot have T={self.temperature} and nu={self.nu}"
            )

    def outcomes(self, margins: ArrayLike) -> Floats:
        """Return P(first), P(tie), P(second) of margins, shape (n_pairs, 3); rows sum to 1."""
        d = np.asarray(margins, dtype=np.float64) / self.temperature
        return np.exp(_log_outcomes(self.model, d, self.nu))

    def tie_probability(self, margins: ArrayLike) -> Floats:
        """Return P(tie) of margins, shape (n_pairs,)."""
        return np.asarray(self.outcomes(margins)[:, TIE])

    def given_no_tie(self, margins: ArrayLike) -> Floats:
        """Return P(first | no tie) of margins, shape (n_pairs,); odd about ½."""
        d = np.asarray(margins, dtype=np.float64) / self.temperature
        logs = _log_outcomes(self.model, d, self.nu)
        return np.asarray(expit(logs[:, FIRST] - logs[:, SECOND]), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> TieModel:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d)


def _known(model: str) -> str:
    if model not in TIE_MODELS:
        raise OptionError(f"no tie model {model!r}; choose one of {', '.join(TIE_MODELS)}")
    return model


def _log_outcomes(model: str, d: Floats, nu: float) -> Floats:
    """Log-probabilities (n, 3), exact at any d."""
    if model == "davidson":
        logs = np.stack([d / 2, np.full(d.shape, math.log(nu)), -d / 2], axis=1)
        return np.asarray(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
    first, second = (-np.logaddexp(0, math.log(nu) - side) for side in (d, -d))
    # 1 − P(first) − P(second) = (ν² − 1)·P(first)·P(second).
    tie = math.log(math.expm1(2 * math.log(nu))) + first + second
    return np.stack([first, tie, second], axis=1)


def fit_ties(
    margins: ArrayLike,
    targets: ArrayLike,
    ties: ArrayLike,
    *,
    model: str = "davidson",
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    min_judgments: int = MIN_JUDGMENTS,
    level: float = 0.95,
) -> TieModel:
    """Fit T and ν together on the likelihood of the three outcomes.

    Parameters
    ----------
    margins : array_like, shape (n_pairs,)
        Aggregated reward of the first minus that of the second.
    targets : array_like, shape (n_pairs,)
        Share of votes for the first, in [0, 1]; a tie is half a vote for each side.
    ties : array_like, shape (n_pairs,)
        Share of votes that are ties, in [0, 2·min(target, 1 − target)].
    model : str
        ``"davidson"`` or ``"rao-kupper"``.
    weights : array_like, shape (n_pairs,), optional
        Weight of each judgment, > 0.
    groups : array_like of int, shape (n_pairs,), optional
        Prompt of each pair (default: all differ).
    min_judgments : int
        Minimum number of judgments with a margin other than 0.
    level : float
        Nominal coverage of both intervals, which are sandwiches over prompts [3]_.

    Returns
    -------
    TieModel
        The same for either orientation of the pairs.

    Raises
    ------
    TooFewJudgmentsError
        If fewer than `min_judgments` judgments have a margin other than 0.
    CalibrationError
        If no judgment is a tie, or all are.
    SeparableError
        If a threshold on the margin separates all verdicts.
    NoPositiveTemperatureError
        If the margins contradict the judgments.
    """
    _known(model)
    x, y, w = read_judgments(margins, targets, weights, min_judgments=min_judgments)
    t = np.asarray(ties, dtype=np.float64)
    if t.shape != x.shape or not ((t >= 0) & (t <= 2 * np.minimum(y, 1 - y) + 1e-9)).all():
        raise OptionError(
            "ties must be one share per judgment, in [0, 2·min(target, 1 − target)], since a tie "
            "counts half in the target"
        )
    scale = float(np.sqrt(np.mean(x**2)))
    x = x / scale
    _refuse(x, y, w, t)
    point = _newton(model, x, y, w, t)
    return _described(model, point, x, y, w, t, groups=groups, level=level, scale=scale)


def _refuse(x: Floats, y: Floats, w: Floats, t: Floats) -> None:
    if not t.any():
        raise CalibrationError(
            f"none of {len(x)} judgments is a tie, so ν cannot be fitted; leave the tie model out, "
            "or pass judgments whose ties were kept"
        )
    if (t >= 1).all():
        raise CalibrationError(f"all {len(x)} judgments are ties, so no temperature can be fitted")
    require_pull(x, y, w)
    first, second = y - t / 2 > 1e-9, 1 - y - t / 2 > 1e-9
    against = ((x > 0) & second) | ((x < 0) & first)
    sizes = np.abs(x)
    if not against.any() and sizes[t > 0].max() <= sizes[first | second].min():
        raise SeparableError(
            f"a threshold on the margin separates all {len(x)} verdicts, so the likelihood pulls T "
            "to 0; use more judgments, or ones that the members were not trained on"
        )


_Terms: TypeAlias = tuple[Floats, Floats, Floats, Floats, Floats]
_Likelihood: TypeAlias = Callable[[Floats, Floats, Floats, float], _Terms]


def _davidson(d: Floats, y: Floats, t: Floats, log_nu: float) -> _Terms:
    """Return derivatives of each judgment's log-likelihood: d, ν; dd, dν, νν (ν: its log)."""
    p = np.exp(_log_outcomes("davidson", d, math.exp(log_nu)))
    lead, tie = p[:, FIRST] - p[:, SECOND], p[:, TIE]
    return (
        (2 * y - 1 - lead) / 2,
        t - tie,
        -((1 - tie) - lead**2) / 4,
        tie * lead / 2,
        -tie * (1 - tie),
    )


def _rao_kupper(d: Floats, y: Floats, t: Floats, log_nu: float) -> _Terms:
    """Return derivatives of each judgment's log-likelihood: d, ν; dd, dν, νν (ν: its log)."""
    a, b = y + t / 2, 1 - y + t / 2
    p, q = np.asarray(expit(d - log_nu)), np.asarray(expit(-d - log_nu))
    slope, bend = 2 / -math.expm1(-2 * log_nu), math.sinh(log_nu) ** -2
    up, down = a * p * (1 - p), b * q * (1 - q)
    return (
        a * (1 - p) - b * (1 - q),
        t * slope - a * (1 - p) - b * (1 - q),
        -up - down,
        up - down,
        -up - down - t * bend,
    )


_TERMS: dict[str, _Likelihood] = {"davidson": _davidson, "rao-kupper": _rao_kupper}


def _sums(terms: _Terms, x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Return gradient (2,) and Hessian (2, 2) of the log-likelihood in (β, log ν)."""
    by_d, by_nu, dd, dn, nn = terms
    cross = float((w * x * dn).sum())
    gradient = np.array([(w * x * by_d).sum(), (w * by_nu).sum()])
    return gradient, np.array([[(w * x * x * dd).sum(), cross], [cross, (w * nn).sum()]])


def _newton(model: str, x: Floats, y: Floats, w: Floats, t: Floats) -> Floats:
    """Maximise over (β, log ν) by Newton's method; only Davidson's log ν may be negative."""

    def height(point: Floats) -> float:
        beta, log_nu = point
        if beta <= 0 or (model == "rao-kupper" and log_nu <= 0) or abs(log_nu) > 300:
            return -math.inf
        return -_nll(model, beta * x, y, w, t, math.exp(log_nu))

    share = float(np.clip((w * t).sum() / w.sum(), 0.01, 0.99))
    start = math.log(2 * share / (1 - share)) if model == "davidson" else 2 * math.atanh(share)
    point = np.array([0.5, start])
    best = height(point)
    for _ in range(200):
        gradient, hessian = _sums(_TERMS[model](point[0] * x, y, t, point[1]), x, w)
        step = np.linalg.solve(hessian, -gradient)
        size = 1.0
        while size > 1e-12 and height(point + size * step) < best - 1e-15:
            size /= 2
        new = point + size * step
        if size <= 1e-12 or np.abs(size * step).max() <= 1e-9 * max(1.0, np.abs(point).max()):
            return new if height(new) >= best else point
        point, best = new, height(new)
        if point[0] > 1e9:
            break
    raise SeparableError("the likelihood pulls T to 0; use more judgments")


def _nll(model: str, d: Floats, y: Floats, w: Floats, t: Floats, nu: float) -> float:
    shares = np.stack([y - t / 2, t, 1 - y - t / 2], axis=1)
    total = (w[:, None] * shares * _log_outcomes(model, d, nu)).sum()
    return float(-total / w.sum())


def _described(
    model: str,
    point: Floats,
    x: Floats,
    y: Floats,
    w: Floats,
    t: Floats,
    *,
    groups: ArrayLike | None,
    level: float,
    scale: float,
) -> TieModel:
    """Return the model at the optimum, with sandwich intervals."""
    beta, log_nu = float(point[0]), float(point[1])
    terms = _TERMS[model](beta * x, y, t, log_nu)
    _, hessian = _sums(terms, x, w)
    rows = [w * x * terms[0], w * terms[1]]
    scores = np.stack(rows if groups is None else [add_up(row, groups) for row in rows])
    count = scores.shape[1]
    bread = np.linalg.inv(hessian)
    cover = bread @ (scores @ scores.T) @ bread * count / max(count - 1, 1)
    reach = float(student.ppf(0.5 + level / 2, max(count - 1, 1)))
    log_se = math.sqrt(cover[0, 0]) / beta
    # Intervals are symmetric in log ν for Davidson, and in log log ν for Rao and Kupper (ν > 1).
    se = math.sqrt(cover[1, 1])
    if model == "davidson":
        ends = [math.exp(log_nu + sign * min(reach * se, 300)) for sign in (-1, 1)]
    else:
        ends = [
            math.exp(min(log_nu * math.exp(sign * min(reach * se / log_nu, 300)), 700))
            for sign in (-1, 1)
        ]
    temperature = scale / beta
    return TieModel(
        model,
        temperature,
        temperature * math.exp(-reach * log_se),
        temperature * math.exp(min(reach * log_se, 700.0)),
        log_se,
        math.exp(log_nu),
        ends[0],
        ends[1],
        _nll(model, beta * x, y, w, t, math.exp(log_nu)),
        len(x),
        count,
        float((w * t).sum() / w.sum()),
    )
