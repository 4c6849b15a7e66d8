"""Tie models: identities, planted values, an independent optimum, refusals, the way through."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from ensemble_rm import (
    Calibration,
    FunctionScorer,
    Preference,
    Preferences,
    RewardEnsemble,
    load_preferences,
)
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser, ScoredPairs, TieModel, fit_ties
from ensemble_rm.calibration.calibration import fit_calibration, refit_calibration
from ensemble_rm.calibration.ties import TIE_MODELS
from ensemble_rm.errors import (
    CalibrationError,
    DataError,
    NonFiniteScoreError,
    NoPositiveTemperatureError,
    OptionError,
    SeparableError,
    TooFewJudgmentsError,
)
from ensemble_rm.members import HeadScorer

each_model = pytest.mark.parametrize("model", TIE_MODELS)
margins = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20).map(np.array)


def model_of(model: str, t: float, nu: float) -> TieModel:
    nu = 1 + nu if model == "rao-kupper" else nu
    return TieModel(model, t, t, t, 0.0, nu, nu, nu, 0.0, 0, 0, 0.0)


def planted(
    model: str, t: float, nu: float, n: int = 4000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, targets and tie shares of judgments drawn from the textbook's formulas."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2 * t, n)
    a, b = np.exp(x / t), np.ones(n)  # the two strengths
    if model == "davidson":
        whole = a + b + nu * np.sqrt(a * b)
        first, tie = a / whole, nu * np.sqrt(a * b) / whole
    else:
        first, second = a / (a + nu * b), b / (b + nu * a)
        tie = 1 - first - second
    u = rng.random(n)
    tied = (u >= first) & (u < first + tie)
    return x, np.where(tied, 0.5, (u < first).astype(float)), tied.astype(float)


@each_model
@given(margins, st.floats(0.01, 100), st.floats(1e-3, 50))
def test_identities(model: str, x: np.ndarray, t: float, nu: float) -> None:
    one = model_of(model, t, nu)
    p, turned = one.outcomes(x), one.outcomes(-x)
    assert (p >= 0).all()
    assert p.sum(axis=1) == pytest.approx(np.ones(len(x)))
    assert p[:, ::-1] == pytest.approx(turned)  # swapped sides
    told = one.given_no_tie(x)
    assert told + one.given_no_tie(-x) == pytest.approx(np.ones(len(x)))
    decided = p[:, 0] + p[:, 2] > 1e-12
    odds = p[decided, 0] / (p[decided, 0] + p[decided, 2])
    assert told[decided] == pytest.approx(odds)
    if model == "davidson":
        assert told == pytest.approx(expit(x / t))
    at_zero = one.tie_probability(np.zeros(1))[0]
    assert (one.tie_probability(x) <= at_zero + 1e-12).all()
    known = one.nu / (2 + one.nu) if model == "davidson" else (one.nu - 1) / (one.nu + 1)
    assert at_zero == pytest.approx(known)


@each_model
@pytest.mark.parametrize("t", [0.4, 3.0])
@pytest.mark.parametrize("nu", [1.2, 3.0])
def test_planted_values_are_recovered(model: str, t: float, nu: float) -> None:
    x, y, ties = planted(model, t, nu, n=20_000)
    fit = fit_ties(x, y, ties, model=model)
    assert fit.temperature == pytest.approx(t, rel=0.06)
    assert fit.nu == pytest.approx(nu, rel=0.06)
    assert fit.tie_share == ties.mean()


@pytest.mark.slow
@each_model
def test_intervals_cover_planted_values_in_clustered_data(model: str) -> None:
    """At a nominal 95 %, at least 92 % over 500 replicates of 80 prompts with equal verdicts."""
    within_t = within_nu = 0
    for seed in range(500):
        x, y, ties = (np.repeat(a, 4) for a in planted(model, 1.5, 1.6, n=80, seed=seed))
        fit = fit_ties(x, y, ties, model=model, groups=np.repeat(np.arange(80), 4))
        within_t += fit.low <= 1.5 <= fit.high
        within_nu += fit.nu_low <= 1.6 <= fit.nu_high
    assert min(within_t, within_nu) >= 460


@each_model
def test_the_fit_is_the_optimum_that_a_general_minimiser_finds(model: str) -> None:
    """On weighted votes, against the likelihood written from the models' first formulas."""
    rng = np.random.default_rng(3)
    x, y, ties = (a.reshape(100, 3) for a in planted(model, 1.0, 1.8, n=300))
    x, y, ties = np.repeat(x[:, :1], 3, axis=1).mean(1), y.mean(1), ties.mean(1)
    w = rng.uniform(0.5, 2, 100)
    y = np.clip(y, ties / 2, 1 - ties / 2)

    def loss(point: np.ndarray) -> float:
        a, b, nu = np.exp(point[0] * x / 2), np.exp(-point[0] * x / 2), math.exp(point[1])
        if model == "davidson":
            first, second = a / (a + b + nu), b / (a + b + nu)
        else:
            first, second = a / (a + nu * b), b / (b + nu * a)
        tie = 1 - first - second
        shares = (y - ties / 2, ties, 1 - y - ties / 2)
        parts = (s * np.log(p) for s, p in zip(shares, (first, tie, second), strict=True))
        return float(-(w * sum(parts)).sum() / w.sum())

    found = minimize(
        loss, [0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}
    )
    fit = fit_ties(x, y, ties, model=model, weights=w)
    assert (1 / fit.temperature, math.log(fit.nu)) == pytest.approx(tuple(found.x), rel=1e-5)
    assert fit.nll == pytest.approx(found.fun)


@each_model
@given(st.floats(0.01, 100), st.integers(0, 99))
def test_scale_and_sides(model: str, scale: float, seed: int) -> None:
    x, y, ties = planted(model, 1.0, 1.5, n=200)
    fit = fit_ties(x, y, ties, model=model)
    flip = np.random.default_rng(seed).random(len(x)) < 0.5
    turned = fit_ties(scale * np.where(flip, -x, x), np.where(flip, 1 - y, y), ties, model=model)
    assert turned.temperature == pytest.approx(scale * fit.temperature)
    assert turned.nu == pytest.approx(fit.nu)
    assert turned.low == pytest.approx(scale * fit.low)
    assert turned.nu_high == pytest.approx(fit.nu_high)


@each_model
def test_votes_weights_and_single_verdicts_agree(model: str) -> None:
    x, y, ties = planted(model, 1.0, 1.5, n=600)
    x = np.repeat(x[::3], 3)
    one_by_one = fit_ties(x, y, ties, model=model, groups=np.arange(600) // 3)
    joined = fit_ties(
        x[::3],
        y.reshape(200, 3).mean(1),
        ties.reshape(200, 3).mean(1),
        model=model,
        weights=np.full(200, 3.0),
    )
    for name in ("temperature", "nu", "low", "nu_low", "nll", "prompts"):
        assert getattr(joined, name) == pytest.approx(getattr(one_by_one, name)), name


@each_model
def test_refusals(model: str) -> None:
    x, y, ties = planted(model, 1.0, 1.5, n=200)
    with pytest.raises(TooFewJudgmentsError, match="49"):
        fit_ties(x[:49], y[:49], ties[:49], model=model)
    with pytest.raises(CalibrationError, match="none of 200"):
        fit_ties(x, np.round(y), 0 * ties, model=model)
    with pytest.raises(CalibrationError, match="all 200"):
        fit_ties(x, 0 * y + 0.5, 0 * ties + 1, model=model)
    with pytest.raises(NoPositiveTemperatureError, match="contradict"):
        fit_ties(-x, y, ties, model=model)
    near = np.abs(x) < 0.5
    with pytest.raises(SeparableError, match="threshold"):
        fit_ties(x, np.where(near, 0.5, x > 0), near.astype(float), model=model)
    with pytest.raises(NonFiniteScoreError):
        fit_ties(np.append(x, np.nan), np.append(y, 1), np.append(ties, 0), model=model)
    with pytest.raises(OptionError, match="counts half"):
        fit_ties(x, y, 0 * ties + 1, model=model)
    with pytest.raises(OptionError, match="no tie model"):
        fit_ties(x, y, ties, model="coin")
    with pytest.raises(OptionError, match="nu=0"):
        dataclasses.replace(model_of(model, 1.0, 1.0), nu=0.0)


# The way from rows to a comparison -----------------------------------------------------------


def rows(n: int = 400, seed: int = 1) -> Preferences:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        a, b = ("w" * int(k) for k in rng.integers(1, 30, 2))
        votes = rng.multinomial(3, model_of("davidson", 8.0, 1.0).outcomes([len(a) - len(b)])[0])
        said = {"chosen": int(votes[0]), "rejected": int(votes[2]), "tie": int(votes[1])}
        found.append({"prompt": f"p{i // 2}", "chosen": a, "rejected": b, "votes": said})
    return load_preferences(found)


def ensemble() -> RewardEnsemble:
    member = FunctionScorer("length", lambda sample: float(len(sample.completion)))
    return RewardEnsemble((member,), Normaliser.identity(1), mean())


@each_model
def test_a_comparison_says_how_likely_a_tie_is(model: str) -> None:
    plain, tied = ensemble().calibrate(rows()), ensemble().calibrate(rows(), ties=model)
    asked: tuple[Any, ...] = (["Hi"] * 2, ["wwww", "w" * 20], ["wwwww", "w"])
    without, verdict = plain.compare(*asked), tied.compare(*asked)
    assert without.outcomes is None
    assert without.tie_probability is None
    assert (verdict.probability == without.probability).all()
    assert verdict.outcomes is not None
    assert verdict.tie_probability is not None
    assert verdict.outcomes.sum(axis=1) == pytest.approx(np.ones(2))
    assert verdict.tie_probability[0] > verdict.tie_probability[1]
    assert tied.calibration is not None
    fit = tied.calibration.tie_model
    assert fit is not None
    assert fit.tie_share == pytest.approx(rows().tie_shares.mean())
    if model == "davidson":
        assert fit.low < 8.0 < fit.high
        assert fit.nu_low < 1.0 < fit.nu_high
    read = Calibration.from_json(json.loads(json.dumps(tied.calibration.to_json())))
    assert read == tied.calibration
    old = {k: v for k, v in tied.calibration.to_json().items() if k != "tie_model"}
    assert Calibration.from_json(old).tie_model is None


@each_model
def test_another_aggregator_keeps_the_tie_model(model: str) -> None:
    rng = np.random.default_rng(0)
    x, y, ties = planted(model, 1.0, 1.5, n=400)
    first = x[:, None] + rng.normal(0, 0.3, (400, 3))
    pairs = ScoredPairs(first, 0 * first, y, np.ones(400), np.arange(400), ties=ties)
    kept = ScoredPairs.from_arrays(pairs.arrays(), pairs.subset_names)
    assert (kept.ties == ties).all()
    assert (kept.take(np.array([5, 3])).ties == ties[[5, 3]]).all()
    calibration = fit_calibration(pairs, mean(), ties=model)
    other = refit_calibration(calibration, lcb(kappa=1.0))
    assert other.tie_model is not None
    assert other.tie_model.model == model
    assert refit_calibration(fit_calibration(pairs, mean()), lcb(kappa=1.0)).tie_model is None


def test_judgments_without_ties_are_refused_by_name() -> None:
    sides = [
        sorted((p.chosen, p.rejected), key=len, reverse=i % 5 > 0) for i, p in enumerate(rows())
    ]
    hard = tuple(Preference(f"p{i}", *pair) for i, pair in enumerate(sides))
    with pytest.raises(CalibrationError):
        ensemble().calibrate(Preferences(hard), ties="davidson")


def test_tied_votes_are_kept_and_read_back() -> None:
    said = {"prompt": "p", "chosen": "a", "rejected": "b"}
    votes = {"chosen": 2, "rejected": 0, "tie": 1}
    pair, hard, plain = load_preferences(
        [{**said, "votes": votes}, {**said, "tie": True}, {**said, "votes": [1, 1]}]
    )
    assert (pair.votes, pair.tie_share, pair.target) == ((2.5, 0.5), 1 / 3, 2.5 / 3)
    assert (hard.tie_share, plain.tie_share) == (1.0, 0.0)
    for one in (pair, hard, plain):
        assert one.swap().tie_share == one.tie_share
        assert one.swap().swap().target == one.target
        assert load_preferences([one.swap().to_json()])[0] == one.swap()


@pytest.mark.parametrize(
    "row",
    [{"votes": [2, 1], "tie_votes": 3}, {"tie_votes": 1}, {"votes": {"tie": -1, "chosen": 2}}],
)
def test_impossible_tied_votes_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        load_preferences([{"prompt": "p", "chosen": "a", "rejected": "b", **row}])


@pytest.mark.parametrize("file", ["mtbench_votes.jsonl", "fgrlhf_ties.jsonl"])
@each_model
def test_real_verdicts_with_ties(model: str, file: str, shared_data: Path) -> None:
    """Length as the reward: the share of ties is met on average, and swapping changes nothing."""
    pairs = load_preferences(shared_data / file)
    x = np.array([math.log1p(len(p.chosen)) - math.log1p(len(p.rejected)) for p in pairs])
    x = x if (x * (2 * pairs.targets - 1)).sum() > 0 else -x
    fit = fit_ties(x, pairs.targets, pairs.tie_shares, model=model, groups=pairs.groups)
    share = fit.tie_probability(x).mean()
    assert share == pytest.approx(pairs.tie_shares.mean(), abs=0.01)
    turned = pairs.shuffled_sides(seed=0)
    flip = np.array([a.chosen != b.chosen for a, b in zip(pairs, turned, strict=True)])
    again = fit_ties(
        np.where(flip, -x, x), turned.targets, turned.tie_shares, model=model, groups=turned.groups
    )
    assert again.nu == pytest.approx(fit.nu)


def test_a_preference_of_a_tie_is_what_it_was() -> None:
    """Rows without tied votes are written, and digested, as before."""
    assert "tie_votes" not in Preference("p", "a", "b", votes=(2, 1)).to_json()
    assert Preference("p", "a", "b", tie=True).target == 0.5


def test_a_saved_ensemble_keeps_its_tie_model(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    x, y, ties = planted("davidson", 1.0, 1.5, n=300)
    both = np.stack([x, x], axis=1)
    pairs = ScoredPairs(both, 0 * both, y, np.ones(300), np.arange(300), ties=ties)
    calibration = fit_calibration(pairs, mean(), ties="davidson")
    made = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean(), calibration)
    made.save_pretrained(tmp_path / "saved")
    read = RewardEnsemble.from_pretrained(tmp_path / "saved")
    assert read.calibration == calibration
    assert read.calibration is not None
    assert read.calibration.evidence is not None
    assert (read.calibration.evidence.ties == ties).all()
    again = read.recalibrate(lcb(kappa=0.0))  # on the evidence; the same reward
    assert again.calibration is not None
    assert again.calibration.tie_model is not None
    known = calibration.tie_model
    assert known is not None
    assert again.calibration.tie_model.nu == pytest.approx(known.nu)
