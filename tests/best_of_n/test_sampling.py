"""DPO pairs of n samples a prompt: sure enough, TRL's shape, read back by this library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import (
    FunctionScorer,
    Message,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    load_preferences,
)
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.best_of_n import make_pairs
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.errors import AggregatorMismatchError, NotCalibratedError, OptionError
from ensemble_rm.members import HeadScorer


def judged(temperature: float = 2.0) -> Preferences:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(600):
        n, m = (int(x) for x in rng.integers(1, 15, 2))
        won = rng.random() < 1 / (1 + math.exp(-(n - m) / temperature))
        sides = ("x" * n, "x" * m) if won else ("x" * m, "x" * n)
        rows.append(Preference(f"p{i}", *sides))
    return Preferences(tuple(rows))


@pytest.fixture(scope="module")
def ensemble() -> RewardEnsemble:
    member = FunctionScorer("length", lambda s: float(len(s.completion)))
    return RewardEnsemble((member,), Normaliser.identity(1), mean()).calibrate(judged())


def samples(prompt: object, *lengths: int) -> list[Sample]:
    return [Sample(prompt, "x" * n) for n in lengths]  # type: ignore[arg-type]


def test_the_best_stands_against_the_worst(ensemble: RewardEnsemble) -> None:
    mixed = samples("p", 3, 9) + samples("q", 5, 6) + samples("p", 1) + samples("alone", 4)
    (pair,) = make_pairs(ensemble, mixed, threshold=0.8)
    assert (pair.prompt, len(pair.chosen), len(pair.rejected)) == ("p", 9, 1)
    assert (pair.reward_chosen, pair.reward_rejected) == (9.0, 1.0)
    verdict = ensemble.compare(["p"], [pair.chosen], [pair.rejected])
    assert pair.probability == pytest.approx(float(verdict.probability[0]))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 0.99])
def test_every_pair_passes_and_none_that_passes_is_missing(
    ensemble: RewardEnsemble, threshold: float
) -> None:
    pool = samples("p", 2, 5, 7, 12)
    pairs = make_pairs(ensemble, pool, threshold=threshold, per_prompt=6)
    calibration = ensemble.calibration
    assert calibration is not None
    margins = [a - b for a in (12, 7, 5, 2) for b in (12, 7, 5, 2) if a > b]
    wanted = sorted((p for p in calibration.probability(margins) if p >= threshold), reverse=True)
    assert [pair.probability for pair in pairs] == pytest.approx(wanted)


def test_equal_completions_and_ties_make_no_pair(ensemble: RewardEnsemble) -> None:
    tied = [Sample("q", "xx"), Sample("q", "yy")]
    assert make_pairs(ensemble, samples("p", 4, 4) + tied, threshold=0.5, per_prompt=9) == []
    assert make_pairs(ensemble, [], threshold=0.5) == []


def test_rows_are_trls_and_read_back(ensemble: RewardEnsemble, tmp_path: Path) -> None:
    chat = (Message("user", "Hi"),)
    pairs = make_pairs(ensemble, samples("p", 1, 9) + samples(chat, 1, 14))
    plain, turns = (pair.to_json(soft=True) for pair in pairs)
    assert plain["chosen"] == "x" * 9
    assert turns["chosen"] == [{"role": "assistant", "content": "x" * 14}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (plain, turns)))
    back = load_preferences(file)
    assert [(p.prompt, p.chosen, p.rejected) for p in back] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs
    ]
    assert back.targets.tolist() == pytest.approx([pair.probability for pair in pairs])
    assert "votes" not in pairs[0].to_json()


def test_what_has_no_probability_is_named(ensemble: RewardEnsemble) -> None:
    pool = samples("p", 1, 9)
    with pytest.raises(AggregatorMismatchError):
        make_pairs(ensemble.with_aggregator(lcb(kappa=0.0)), pool)
    bare = RewardEnsemble(ensemble.scorers, Normaliser.identity(1), mean())
    with pytest.raises(NotCalibratedError):
        make_pairs(bare, pool)
    with pytest.raises(OptionError, match="threshold"):
        make_pairs(ensemble, pool, threshold=0.4)
    with pytest.raises(OptionError, match="per_prompt"):
        make_pairs(ensemble, pool, per_prompt=0)


def test_the_command(
    two_heads: Callable[..., HeadScorer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    words = ["yes", "no", "hello there", "it is so", "why not", "a dog", "the fox jumps"]
    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        first, second = rng.choice(words, 2, replace=False)
        rows.append(Preference(f"Say {i}", str(first), str(second)))
    pairs = Preferences(tuple(rows))
    scale = float(raw.judge(pairs).margins(mean()).std()) / 3
    raw = RewardEnsemble(raw.scorers, Normaliser((0.0, 0.0), (scale, scale)), mean())
    margin = raw.judge(pairs).margins(mean())
    wins = rng.random(200) < 1 / (1 + np.exp(-margin))
    held = [
        pair if won else Preference(pair.prompt, pair.rejected, pair.chosen)
        for pair, won in zip(pairs, wins, strict=True)
    ]
    folder = raw.calibrate(Preferences(tuple(held))).save_pretrained(tmp_path / "run")
    data, out = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Ask {i}", "completion": word} for word in words for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    command = ["make-pairs", str(folder), "--device", "cpu", "--data", str(data), "--json"]
    command += ["--threshold", "0.6", "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["out"] is None and not out.exists()
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert (said["prompts"], said["samples"]) == (5, 35)
    assert said["pairs"] == planned["pairs"] == len(made) > 0
    assert all(row["probability"] >= 0.6 for row in made)
    wrong = 1 - np.mean([row["probability"] for row in made])
    assert said["label_smoothing"] == pytest.approx(wrong)
