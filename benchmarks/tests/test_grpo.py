"""The GRPO benchmark: its order of prompts, its figures, and that a run that was cut goes on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.overoptimisation import grpo_figures
from ensemble_rm import FunctionScorer, RewardEnsemble
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser

CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ["tea", "rain", "the sea", "a dog", "my cat", "old bread", "good red wine", "a big house"]


@pytest.fixture
def tokenizer(minilm_folder: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(minilm_folder)
    loaded.chat_template = CHAT
    return loaded


@pytest.fixture
def grpo_runs() -> Any:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    return importlib.import_module("benchmarks.overoptimisation.grpo_runs")


def test_a_steps_prompts_have_one_length_and_none_comes_twice(
    grpo_runs: Any, tokenizer: Any
) -> None:
    asked = [f"{how} {what}" for how in ("tell of", "what is") for what in WORDS]
    plan = grpo_runs.Plan(steps=6, prompts=2)
    orders = {seed: grpo_runs.prompt_order(asked, tokenizer, plan, seed) for seed in (0, 1)}
    for order in orders.values():
        assert len(order) == len(set(order)) == 12 and set(order) <= set(asked)
        lengths = [len(grpo_runs.encode(tokenizer, prompt)) for prompt in order]
        assert lengths[::2] == lengths[1::2]
    assert orders[0] != orders[1]
    shorter = grpo_runs.Plan(steps=4, prompts=2)
    assert grpo_runs.prompt_order(asked, tokenizer, shorter, 0) == orders[0][:8]
    with pytest.raises(SystemExit, match="steps, not 9"):
        grpo_runs.prompt_order(asked, tokenizer, grpo_runs.Plan(steps=9, prompts=2), 0)


def rows_of(gold: np.ndarray, start: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "gold": value,
            "reward": 2 * value,
            "kl": float(i) if i % 2 else None,
            "log_length": np.log(50.0),
            "member_std": None,
            "processor_seconds": 1.0,
        }
        for i, value in enumerate(gold + start)
    ]


def test_gains_are_over_the_same_prompts() -> None:
    rng = np.random.default_rng(0)
    start, n = rng.normal(0, 5, 40), 40
    planted = np.minimum(np.arange(n), 20) * 0.1 - np.maximum(np.arange(n) - 20, 0) * 0.05
    before = {"gold": [*start, 9.0], "single": [*(2 * start), 9.0]}  # of a longer plan
    made = grpo_figures.Course.of("single", 0.0, 0, rows_of(planted, start), start=before, unit=0.5)
    np.testing.assert_allclose(made.values["gold"], planted / 0.5)
    np.testing.assert_allclose(made.values["proxy"], 2 * planted)
    assert made.window == 4
    assert made.final("gold") == pytest.approx(planted[-4:].mean() / 0.5)
    means = np.convolve(planted, np.full(4, 0.25), "valid")
    assert made.peak("gold") == pytest.approx(means.max() / 0.5)
    assert made.final("kl") == pytest.approx(38.0)  # of 37 and 39, what was measured
    assert made.final("length") == pytest.approx(50.0) and np.isnan(made.final("std"))


class Recorder:
    """What a report writes, by name."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def add_repeats(self, name: str, values: list[float]) -> None:
        self.found[name] = values


def test_a_gain_is_against_the_single_head_of_the_same_seed(tmp_path: Path) -> None:
    start = np.zeros(10)
    courses = []
    for arm, seed, end in (("single", 0, 1.0), ("single", 1, 3.0), ("views_uwo", 1, 3.5)):
        rows = rows_of(np.linspace(0, end, 10), start)
        before = {"gold": start, arm: start}
        courses.append(grpo_figures.Course.of(arm, 0.0, seed, rows, start=before, unit=1.0))
    said = Recorder()
    grpo_figures.report(said, courses)
    assert said.found["gold_gain_views_uwo_beta0"] == pytest.approx([0.5])
    assert said.found["gold_final_single_beta0"] == pytest.approx([1.0, 3.0])
    assert "gold_gain_single_beta0" not in said.found
    assert not any(name.startswith("std_final") for name in said.found)
    grpo_figures.picture(courses, tmp_path / "grpo.png")
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_belongs_to_one_plan_of_any_length(grpo_runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for steps in (4, 8):
        grpo_runs.check_plan(file, {"steps": steps, "save_every": 5, "tokens": 24})
    assert json.loads(file.read_text())["steps"] == 8
    with pytest.raises(SystemExit, match="another plan"):
        grpo_runs.check_plan(file, {"steps": 8, "save_every": 5, "tokens": 32})


def test_a_line_that_was_cut_is_left_out(grpo_runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert grpo_runs.read_rows(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert grpo_runs.read_rows(file) == [{"step": 1}, {"step": 2}]


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(
    grpo_runs: Any, tiny_policy: Path, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    tokenizer.save_pretrained(tiny_policy)
    letters = FunctionScorer("letters", lambda s: float(len(s.completion)) / 10)
    spaces = FunctionScorer("spaces", lambda s: float(s.completion.count(" ")))
    world = {
        "policy": tiny_policy,
        "prompts": [f"tell of {what}" for what in WORDS],
        "proxy": RewardEnsemble((letters, spaces), Normaliser.identity(2), mean()),
        "gold": RewardEnsemble((spaces,), Normaliser.identity(1), mean()),
    }
    sizes = {"prompts": 1, "copies": 4, "tokens": 5, "kl_every": 1, "save_every": 2}
    run = grpo_runs.Run("views_mean", 0.05, 0)
    plan = grpo_runs.Plan(steps=5, learning_rate=0.5, **sizes)
    whole = grpo_runs.run_one(run, plan, tmp_path / "whole", **world)
    shorter = grpo_runs.Plan(steps=3, learning_rate=0.5, **sizes)
    part = grpo_runs.run_one(run, shorter, tmp_path / "cut", **world)
    # Killed after a row beyond its checkpoint, which it takes anew.
    (last,) = (tmp_path / "cut/checkpoints").glob("checkpoint-*")
    assert last.name == "checkpoint-3"
    with (tmp_path / "cut/rows.jsonl").open("a") as stream:
        stream.write(json.dumps(part[-1] | {"step": 4}) + "\n")
    found = grpo_runs.run_one(run, plan, tmp_path / "cut", **world)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    for one, other in zip(whole, found, strict=True):
        timeless = one.keys() - {"processor_seconds"}
        assert {name: one[name] for name in timeless} == {name: other[name] for name in timeless}
    assert whole[-1]["kl"] > 0 and whole[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert grpo_runs.run_one(run, shorter, tmp_path / "cut", **world) == found[:3]
