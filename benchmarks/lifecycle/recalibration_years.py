"""Simulated years of judgments with known probabilities, and what a policy makes of them.

A month has 300 judgments, each of a prompt of its own. The truth of month m is
p = σ(Δ/T(m) + offset(m) + bias(m)·ℓ): Δ the reward's margin, ℓ the standardised difference in
length. A policy publishes temperatures at the end of a month, for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from ensemble_rm import Calibration
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import fit_temperature
from ensemble_rm.drift import DriftTest
from ensemble_rm.errors import CalibrationError
from ensemble_rm.evidence.dated_margins import DAY, DatedMargins, forgetting, join_margins
from ensemble_rm.metrics import ece
from ensemble_rm.recalibration.decision import decide
from ensemble_rm.recalibration.options import DecisionOptions

JUDGMENTS = 300
MONTH = 30 * DAY
MONTHS = 12
ONSET = 4  # the first month of the drift: it has been healthy for months 0 to 3
CORRUPTED = 8
WINDOW, HALF_LIFE = 180, 60  # days
SPREAD = 2.0  # of a margin
FRESH = 4000  # pairs that a month's calibration error is measured on
OPTIONS = DecisionOptions(half_life=HALF_LIFE)


class Truth(NamedTuple):
    """What a month's probabilities follow."""

    temperature: float = 1.0
    offset: float = 0.0
    bias: float = 0.0


def step(**changed: float) -> Callable[[int], Truth]:
    return lambda month: Truth(**changed) if month >= ONSET else Truth()


def ramp(month: int) -> Truth:
    """T doubles from the onset to the end of the year."""
    return Truth(2.0 ** (np.clip(month - ONSET + 1, 0, MONTHS) / (MONTHS - ONSET)))


DRIFTS: dict[str, Callable[[int], Truth]] = {
    "control": lambda _: Truth(),
    "scale_1.25": step(temperature=1.25),
    "scale_1.5": step(temperature=1.5),
    "scale_2": step(temperature=2.0),
    "scale_0.5": step(temperature=0.5),
    "ramp_2": ramp,
    "offset_0.4": step(offset=0.4),
    "length_0.8": step(bias=0.8),
}


def draw(rng: np.random.Generator, truth: Truth, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins and true probabilities, each (n,)."""
    margins, lengths = rng.normal(0, SPREAD, n), rng.normal(0, 1, n)
    return margins, expit(margins / truth.temperature + truth.offset + truth.bias * lengths)


def month_of_judgments(
    rng: np.random.Generator, truth: Truth, month: int, corrupted: str
) -> DatedMargins:
    """Draw a month's judgments; those of a corrupted month are coins, or inverted."""
    margins, p = draw(rng, truth, JUDGMENTS)
    won = (rng.random(JUDGMENTS) < p).astype(np.float64)
    coins = (rng.random(JUDGMENTS) < 0.5).astype(np.float64)
    if month == CORRUPTED and corrupted:
        won = {"coins": coins, "inverted": 1 - won}[corrupted]
    return DatedMargins(
        margins,
        margins[:, None] + rng.normal(0, 0.3, (JUDGMENTS, 2)),
        won,
        np.ones(JUDGMENTS),
        np.arange(JUDGMENTS) + 1000 * (month + 1),
        (month + np.sort(rng.random(JUDGMENTS))) * MONTH,
        np.full(JUDGMENTS, -1, np.int32),
    )


@dataclass
class Year:
    """What each policy did.

    Attributes
    ----------
    errors : dict of str to list of float
        ECE against the truth in each month, by policy.
    published : list of int
        Months at whose end the gated job published.
    alarmed : list of int
        Months at whose end its test raised an alarm; a publication begins a new life.
    frozen_alarm : int, optional
        The month at whose end the test of the first calibration, never replaced, alarmed.
    temperatures : list of float
        What the gated job had published for each month.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)
    alarmed: list[int] = field(default_factory=list)
    frozen_alarm: int | None = None
    temperatures: list[float] = field(default_factory=list)


def first_calibration(data: DatedMargins) -> Calibration:
    fit = fit_temperature(data.margins, data.targets, groups=data.groups)
    return Calibration(mean(), fit, fit.temperature, "", "")


def blind(window: DatedMargins, old: float) -> float:
    """Refit and publish, whatever comes; a fit that is impossible changes nothing."""
    weights = forgetting(window.times, half_life=HALF_LIFE * DAY)
    try:
        return fit_temperature(window.margins, window.targets, weights=weights).temperature
    except CalibrationError:
        return old


def take(test: DriftTest, judged: DatedMargins, month: int) -> DriftTest:
    return test.update(judged.margins, judged.targets, prompts=judged.groups, at=str(month))


def simulate(
    drift: Callable[[int], Truth],
    *,
    seed: int,
    corrupted: str = "",
    curves: bool = True,
    options: DecisionOptions = OPTIONS,
) -> Year:
    """Live through a year with every policy on the same judgments."""
    rng = np.random.default_rng(seed)
    held = [month_of_judgments(rng, Truth(), -1, "")]
    gated = first_calibration(held[0])
    none = refitted = gated.temperature
    life = frozen = DriftTest.start(gated.fit)
    year = Year({"none": [], "blind": [], "gated": []} if curves else {})
    for month in range(MONTHS):
        truth = drift(month)
        year.temperatures.append(gated.temperature)
        if curves:
            margins, p = draw(np.random.default_rng([seed, month]), truth, FRESH)
            found = {"none": none, "blind": refitted, "gated": gated.temperature}
            for policy, t in found.items():
                year.errors[policy].append(ece(expit(margins / t), p))
        held.append(month_of_judgments(rng, truth, month, corrupted))
        data = join_margins(held[-WINDOW // 30 :])
        if curves:
            refitted = blind(data, refitted)
        life, frozen = take(life, held[-1], month), take(frozen, held[-1], month)
        if frozen.alarm and year.frozen_alarm is None:
            year.frozen_alarm = month
        if life.alarm:
            year.alarmed.append(month)
        decision = decide(data, mean(), gated, options=options)
        if decision.calibration is not None:
            gated = replace(decision.calibration)
            life = DriftTest.start(gated.fit)
            year.published.append(month)
    return year
