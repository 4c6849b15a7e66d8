"""Precision: float32 beside itself drifts by nothing; drift, flips and ties by hand; every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import spearmanr

from ensemble_rm import (
    FunctionScorer,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    combine,
    load_preferences,
    train,
)
from ensemble_rm.cli.main import main
from ensemble_rm.demo.data import FILE
from ensemble_rm.errors import OptionError
from ensemble_rm.evaluation import precision_report
from ensemble_rm.evaluation.precision import measure_drift, precision_text
from ensemble_rm.members import BranchScorer, FullScorer, HeadScorer, make_recipe

OPTIONS = TrunkOptions(max_length=32, device="cpu")
LENGTH = FunctionScorer("length", lambda s: float(len(s.completion)))
SAMPLES = load_preferences(FILE)[:40].samples()


def test_drift_by_hand() -> None:
    exact = np.array([0.0, 1.0, 2.0, 3.0, 5.0])
    other = np.array([0.0, 2.0, 1.0, 3.0, 3.0])
    groups = [np.array([0, 1, 2]), np.array([3, 4])]
    found = measure_drift("x", exact, other, groups)
    unit = exact.std(ddof=1)
    assert found.rms == pytest.approx(np.sqrt(6 / 5) / unit)
    assert found.maximum == pytest.approx(2 / unit)
    assert (found.flips, found.ties) == (1 / 4, 1 / 4)
    assert found.spearman == pytest.approx(spearmanr(exact, other).statistic)
    lonely = measure_drift("x", exact, np.ones(5), [np.array([i]) for i in range(5)])
    assert np.isnan([lonely.flips, lonely.ties, lonely.spearman]).all()
    with pytest.raises(OptionError, match="x gives all 5 samples the same score"):
        measure_drift("x", other * 0, exact, groups)


@given(st.integers(0, 99), st.floats(0.1, 9), st.floats(-9, 9))
def test_drift_has_the_members_own_unit(seed: int, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    exact, noise = rng.normal(size=12), rng.normal(size=12) * 0.3
    groups = [np.arange(6), np.arange(6, 12)]
    one = measure_drift("x", exact, exact + noise, groups)
    two = measure_drift("x", scale * exact + offset, scale * (exact + noise) + offset, groups)
    assert two.rms == pytest.approx(one.rms) and two.flips == one.flips
    itself = measure_drift("x", exact, exact, groups)
    assert (itself.rms, itself.maximum, itself.flips, itself.ties) == (0, 0, 0, 0)
    assert itself.spearman == pytest.approx(1)


def test_float32_beside_itself_drifts_by_nothing(two_heads: Callable[..., HeadScorer]) -> None:
    ensemble = combine({"a": two_heads(), "b": LENGTH}, load_preferences(FILE)[:40])
    report = precision_report(ensemble, SAMPLES, dtype="float32")
    for row in (*report.members, report.reward):
        assert (row.rms, row.maximum, row.flips, row.ties) == (0, 0, 0, 0)
    assert report.unchanged == ("length",)
    assert report.samples == len(SAMPLES) and report.pairs >= 40
    lower = precision_report(ensemble, SAMPLES)
    assert all(0 < row.rms < 0.2 for row in lower.members[:2])
    assert lower.members[2].rms == 0
    assert 0 < lower.reward.rms < 0.2 and lower.reward.spearman > 0.9
    text = precision_text(lower)
    assert "bfloat16 − float32" in text and "without a dtype" in text
    json.dumps(lower.to_json(), allow_nan=False)


def test_the_reference_is_float32_whatever_the_ensemble_runs_in(
    two_heads: Callable[..., HeadScorer],
) -> None:
    reference = load_preferences(FILE)[:40]
    one = combine({"a": two_heads()}, reference)
    low = RewardEnsemble((two_heads(dtype="bfloat16"),), one.normaliser, one.aggregator)
    exact = RewardEnsemble((two_heads(),), one.normaliser, one.aggregator)
    said = [precision_report(e, SAMPLES).to_json() for e in (low, exact)]
    assert said[0] == said[1]
    assert low.scorers[0].options.dtype == "bfloat16"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["head", "branch", "full"])
def test_every_kind_takes_other_options(kind: str, small_folder: Path, tmp_path: Path) -> None:
    pairs = load_preferences(FILE)[:120].split(0.6, 0.3, seed=0)
    options: dict[str, Any] = {"kind": kind, "members": 2, "options": OPTIONS}
    ensemble = train(
        *pairs,
        backbone=small_folder,
        recipe=make_recipe(kind, **({} if kind == "head" else {"epochs": 1})),
        cache_dir=tmp_path / "cache",
        out=tmp_path / "run",
        **options,
    )
    report = precision_report(ensemble, SAMPLES)
    assert [row.name for row in report.members] == list(ensemble.names)
    assert all(0 < row.rms <= row.maximum for row in report.members)
    for scorer in ensemble.scorers:
        assert isinstance(scorer, HeadScorer | BranchScorer | FullScorer)
        low = TrunkOptions(max_length=32, device="cpu", dtype="bfloat16")
        there = scorer.with_options(low)
        assert there.options == low and there.names == scorer.names
        np.testing.assert_allclose(
            scorer.with_options(OPTIONS).score(SAMPLES[:8]), scorer.score(SAMPLES[:8]), atol=1e-5
        )


def test_what_cannot_be_reported_is_named(two_heads: Callable[..., HeadScorer]) -> None:
    reference = load_preferences(FILE)[:40]
    with pytest.raises(OptionError, match="has a dtype"):
        precision_report(combine({"b": LENGTH}, reference), SAMPLES)
    heads = combine({"a": two_heads()}, reference)
    with pytest.raises(OptionError, match="at least 2 samples, not 1"):
        precision_report(heads, SAMPLES[:1])
    with pytest.raises(OptionError, match="'int4'"):
        precision_report(heads, SAMPLES, dtype="int4")
    with pytest.raises(OptionError, match="the same score"):
        precision_report(heads, [Sample("a", "b")] * 3)


def test_the_command_prints_a_table_or_json(
    two_heads: Callable[..., HeadScorer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensemble = combine({"a": two_heads()}, load_preferences(FILE)[:40])
    run = ensemble.save_pretrained(tmp_path / "run")
    data = tmp_path / "samples.jsonl"
    rows = [{"prompt": s.prompt, "completion": s.completion} for s in SAMPLES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["precision", str(run), f"--data={data}", "--device=cpu", "--dtype=bfloat16"]
    assert main(command) == 0
    assert "▸ mean()" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reward"]["rms"] > 0


def test_drift_is_that_of_the_samples_that_were_scored_twice() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=40)
    other = exact + rng.normal(0, 0.1, 40)
    groups = [np.arange(20), np.arange(20, 40)]
    holed = exact.copy()
    holed[[3, 30]] = np.nan
    kept = np.flatnonzero(~np.isnan(holed))
    inside = [np.flatnonzero(np.isin(kept, rows)) for rows in groups]
    found = measure_drift("far", holed, other, groups)
    assert found == measure_drift("far", exact[kept], other[kept], inside)
    with pytest.raises(OptionError, match="scores 0 of 40"):
        measure_drift("far", np.full(40, np.nan), other, groups)
