"""Metrics against netcal, scikit-learn and their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from ensemble_rm.errors import OptionError
from ensemble_rm.metrics import (
    accuracy,
    agreement,
    auroc,
    bootstrap,
    brier,
    ece,
    ece_null,
    error_auroc,
    nll,
    risk_coverage,
    smooth_ece,
)

# Off the bins' edges, on which 1 − (1 − p) may fall to the other side.
P = arrays(np.float64, 40, elements=st.integers(0, 999).map(lambda i: (i + 0.37) / 1000))
Y = arrays(np.float64, 40, elements=st.sampled_from([0.0, 0.5, 1.0, 0.25]))


def drawn(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.beta(2, 2, n)
    return p, (rng.random(n) < p).astype(float)


@given(P, Y)
def test_no_figure_sees_which_side_is_first(p: np.ndarray, y: np.ndarray) -> None:
    for metric in (nll, brier, accuracy, ece, smooth_ece):
        assert metric(p, y) == pytest.approx(metric(1 - p, 1 - y), abs=1e-9), metric.__name__


def test_against_scikit_learn() -> None:
    p, y = drawn()
    assert nll(p, y) == pytest.approx(log_loss(y, p))
    assert brier(p, y) == pytest.approx(brier_score_loss(y, p))
    assert auroc(p, y > 0.5) == pytest.approx(roc_auc_score(y, p))
    assert accuracy(p, y) == pytest.approx(((p > 0.5) == y).mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bins", [5, 10, 20])
def test_ece_against_netcal_on_both_orientations(bins: int) -> None:
    from netcal.metrics import ECE

    p, y = drawn(seed=bins)
    p = np.clip(p**1.5, 0.01, 0.99)
    both, verdicts = np.concatenate([p, 1 - p]), np.concatenate([y, 1 - y])
    assert ece(p, y, bins=bins) == pytest.approx(ECE(bins).measure(both, verdicts), abs=1e-9)


def test_chosen_first_data_show_no_error_of_their_order() -> None:
    """Perfect probabilities, all stored chosen-first: as calibrated as in a random order."""
    p, y = drawn()
    q = np.where(y > 0.5, p, 1 - p)
    assert ece(q, np.ones_like(q)) == pytest.approx(ece(p, y))
    unsymmetrised = abs((1 - q).mean())
    assert ece(q, np.ones_like(q)) < 0.2 * unsymmetrised


def test_null_band_holds_perfect_models_and_excludes_bad_ones() -> None:
    inside = [
        ece(p, y) <= ece_null(p, draws=200).upper95 for p, y in (drawn(500, s) for s in range(100))
    ]
    assert 88 <= sum(inside) <= 100
    p, y = drawn()
    sharpened = 1 / (1 + ((1 - p) / p) ** 3)
    assert ece(sharpened, y) > ece_null(sharpened).upper95


@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 25),
)
def test_ece_does_not_depend_on_which_side_is_named_first(
    rows: list[tuple[int, float, bool]], bins: int
) -> None:
    """Probabilities in hundredths lie on many bins' edges."""
    p = np.array([percent / 100 for percent, _, _ in rows])
    y = np.array([target for _, target, _ in rows])
    swap = np.array([swapped for _, _, swapped in rows])
    swapped_p = np.array([(100 - n) / 100 if s else n / 100 for n, _, s in rows])
    value = ece(p, y, bins=bins)
    assert ece(swapped_p, np.where(swap, 1 - y, y), bins=bins) == pytest.approx(value, abs=1e-12)
    assert ece(1 - p, 1 - y, bins=bins) == pytest.approx(value, abs=1e-12)


def test_smooth_ece_of_a_planted_error() -> None:
    p, y = drawn(50000)
    assert smooth_ece(p, y) < 0.02
    said, true = np.full(len(p), 0.8), 0.7
    drawn_y = (np.random.default_rng(1).random(len(p)) < true).astype(float)
    assert smooth_ece(said, drawn_y) == pytest.approx(0.1, abs=0.01)


def test_agreement_of_ties_and_votes() -> None:
    assert agreement([0.7, 0.3, 0.5], [1, 1, 1]).tolist() == [1, 0, 0.5]
    assert agreement([0.7, 0.2], [0.75, 0.75]).tolist() == [0.75, 0.25]


def test_error_auroc_finds_planted_doubt() -> None:
    p, y = drawn()
    wrong = (p > 0.5) != (y > 0.5)
    assert error_auroc(p, y, wrong.astype(float)) == 1.0
    assert np.isnan(error_auroc([0.9], [1.0], [0.0]))


def test_risk_coverage_ends_at_the_error_and_starts_with_the_surest() -> None:
    p, y = drawn()
    coverage, risk = risk_coverage(p, y, np.abs(p - 0.5))
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(1 - accuracy(p, y))
    assert risk[len(risk) // 10] < risk[-1]


def test_bootstrap_over_prompts_is_wider_where_prompts_repeat() -> None:
    x = np.random.default_rng(0).normal(size=400)
    alone = bootstrap(lambda i: float(x[i].mean()), np.arange(400))
    copies = np.repeat(x, 9)
    grouped = bootstrap(lambda i: float(copies[i].mean()), np.repeat(np.arange(400), 9))
    blind = bootstrap(lambda i: float(copies[i].mean()), np.arange(3600))
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert blind.high - blind.low < 0.5 * (grouped.high - grouped.low)
    assert alone.estimate == pytest.approx(x.mean())


@pytest.mark.parametrize(
    ("p", "y"), [([1.5], [1]), ([0.5], [2]), ([], []), ([0.5, 0.5], [1]), ([np.nan], [1])]
)
def test_bad_input(p: list[float], y: list[float]) -> None:
    with pytest.raises(OptionError):
        nll(p, y)
