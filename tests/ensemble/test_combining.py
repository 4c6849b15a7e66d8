"""Existing reward models side by side: in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble_rm import (
    FunctionScorer,
    Preferences,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    combine,
    load_preferences,
)
from ensemble_rm.aggregation import minimum
from ensemble_rm.cli.main import main
from ensemble_rm.demo.data import FILE
from ensemble_rm.errors import DataError, OptionError

OPTIONS = TrunkOptions(max_length=48, device="cpu")


@pytest.fixture(scope="module")
def pairs() -> Preferences:
    return load_preferences(FILE)[:40]


@pytest.fixture(scope="module")
def model(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "published"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=1)
    found.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder).save_pretrained(folder)
    return folder


def brevity(sample: Sample) -> float:
    return -float(len(sample.completion))


def test_members_of_any_unit_get_one(pairs: Preferences, model: Path) -> None:
    rule = FunctionScorer("brevity", brevity)
    ensemble = combine({"rm": model, "brevity": rule}, pairs, aggregator=minimum(), options=OPTIONS)
    assert ensemble.names == ("rm", "brevity")
    scores = ensemble.score(pairs.samples())
    np.testing.assert_allclose(scores.members.mean(axis=0), 0, atol=1e-4)
    halves = np.split(scores.members, 2)
    assert (np.abs(halves[0] - halves[1]).mean(axis=0) > 0.5).all()
    np.testing.assert_array_equal(scores.reward, scores.members.min(axis=1))


def test_ensembles_join_under_their_names(pairs: Preferences, model: Path, tmp_path: Path) -> None:
    one = combine({"rm": model}, pairs, options=OPTIONS)
    one.save_pretrained(tmp_path / "one")
    both = combine({"a": tmp_path / "one", "b": one}, pairs, options=OPTIONS)
    assert both.names == ("a/rm", "b/rm")
    raw = both.score(pairs.samples()[:5]).raw
    np.testing.assert_array_equal(raw[:, 0], raw[:, 1])
    both.save_pretrained(tmp_path / "both")
    again = RewardEnsemble.from_pretrained(tmp_path / "both", device="cpu")
    assert again.names == both.names
    np.testing.assert_array_equal(again.score(pairs.samples()[:5]).raw, raw)


def test_nothing_to_combine(pairs: Preferences) -> None:
    with pytest.raises(OptionError, match="at least one member"):
        combine({}, pairs)
    with pytest.raises(DataError):
        combine({"rule": FunctionScorer("rule", brevity)}, Preferences(()))
    with pytest.raises(OptionError, match="gives all completions of a prompt the same score"):
        combine({"rule": FunctionScorer("rule", lambda s: 1.0)}, pairs)


def test_the_command(
    pairs: Preferences, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
    text = ["--max-length=48", "--device=cpu", "--json"]
    arguments = ["combine", f"--member={model}", f"--data={data}", f"--out={out}", *text]
    assert main([*arguments, f"--member={model}"]) == 2
    assert "two members are called" in capsys.readouterr().err
    assert main([*arguments, f"--member=second={model}", "--aggregator=minimum"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["members"] == ["published", "second"]
    assert said["aggregator"] == "minimum()"
    ensemble = RewardEnsemble.from_pretrained(out, device="cpu")
    assert ensemble.score(pairs.samples()[:3]).reward.shape == (3,)
