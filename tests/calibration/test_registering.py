"""A calibrator from outside the package: one curve and its fit, registered once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from scipy.special import expit

from ensemble_rm import Calibration
from ensemble_rm.aggregation import mean, median
from ensemble_rm.calibration import CalibrationData, Calibrator, Curve, ScoredPairs, register
from ensemble_rm.calibration.calibration import fit_calibration, refit_calibration
from ensemble_rm.calibration.calibrator import CALIBRATORS
from ensemble_rm.errors import OptionError, SchemaError, SeparableError


@dataclass(frozen=True)
class LapseCurve(Curve):
    """ε/2 + (1 − ε)·σ(Δ/T): with probability ε the verdict is a coin's."""

    temperature: float
    lapses: tuple[float, ...]
    shape: ClassVar[str] = "lapse"

    def above(self, sizes: np.ndarray) -> np.ndarray:
        return self.lapses[0] / 2 + (1 - self.lapses[0]) * expit(sizes / self.temperature)


def fit_lapse(data: CalibrationData) -> LapseCurve:
    assert (data.margins != 0).all()
    return LapseCurve(data.temperature, (0.1,))


@pytest.fixture
def registered() -> Iterator[Calibrator]:
    yield register(Calibrator("lapse", LapseCurve, fit_lapse))
    del CALIBRATORS["lapse"]


def pairs(n: int = 500) -> ScoredPairs:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, n, 3))
    margins = (first - second).mean(axis=1)
    margins[:3] = 0
    first[:3] = second[:3]
    targets = (rng.random(n) < expit(margins)).astype(float)
    return ScoredPairs(first, second, targets, np.ones(n), np.arange(n))


def test_a_registered_calibrator_is_a_method_like_the_others(registered: Calibrator) -> None:
    calibration = fit_calibration(pairs(), mean(), method="lapse")
    t = calibration.temperature
    x = np.linspace(-9, 9, 101)
    p = calibration.probability(x)
    np.testing.assert_allclose(p[x > 0], 0.05 + 0.9 * expit(x[x > 0] / t))
    np.testing.assert_array_equal(p + calibration.probability(-x), 1.0)
    assert calibration.probability([0.0, np.nan])[0] == 0.5
    read = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert read == calibration
    np.testing.assert_array_equal(read.probability(x), p)
    again = refit_calibration(calibration, median())
    assert (again.method, type(again.curve)) == ("lapse", LapseCurve)
    with pytest.raises(OptionError, match="slices"):
        fit_calibration(pairs(), mean(), method="lapse", slices=True)
    assert register(registered) is registered


def test_it_never_sees_judgments_that_the_temperature_refuses(registered: Calibrator) -> None:
    data = pairs()
    agreed = (data.margins(mean()) > 0).astype(float)
    separable = ScoredPairs(data.first, data.second, agreed, data.weights, data.groups)
    with pytest.raises(SeparableError):
        fit_calibration(separable, mean(), method=registered.name)


def test_a_calibration_loads_only_where_its_method_is_registered(registered: Calibrator) -> None:
    saved = fit_calibration(pairs(), mean(), method="lapse").to_json()
    del CALIBRATORS["lapse"]
    with pytest.raises(SchemaError, match=r"^method: no calibration method 'lapse'"):
        Calibration.from_json(saved)
    register(registered)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(OptionError, match="'power' is registered already"):
        register(Calibrator("power", LapseCurve, fit_lapse))
