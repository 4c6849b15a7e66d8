"""Published reward models: parity with transformers, batches, missing heads, save and load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemble_rm import RewardEnsemble, Sample, TrunkOptions
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import fit_normaliser
from ensemble_rm.errors import ModelError
from ensemble_rm.members import FullScorer
from tests.support.saved_files import record_digests, rewrite_json

OPTIONS = TrunkOptions(max_length=96, device="cpu", token_budget=512)
SAMPLES = [
    Sample("Who are you?", "A fox " * n + "of the woods.") for n in (1, 9, 3, 20, 2, 14, 5, 30)
]


def make_classifier(source: Path, folder: Path, *, pad: str | None = None) -> Path:
    """A classifier of one output over real weights, its head drawn from a seed."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if pad is not None:
        tokenizer.pad_token = pad
        model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(folder: Path) -> None:
    """In batches the scores are those of transformers on each sample alone, unpadded."""
    from transformers import AutoModelForSequenceClassification

    scorer = FullScorer.from_name(folder, OPTIONS)
    detailed = scorer.score_detailed(SAMPLES)
    found = detailed.scores
    assert detailed.truncation.samples == len(SAMPLES)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoder = scorer._open()[0]
    alone = []
    for e in encoder.encode(SAMPLES):
        inputs = {"input_ids": torch.tensor([e.ids])}
        if e.types is not None:
            inputs["token_type_ids"] = torch.tensor([e.types])
        with torch.inference_mode():
            alone.append(model(**inputs).logits.item())
    np.testing.assert_allclose(found[:, 0], alone, atol=1e-4 * np.std(alone))


def test_an_encoders_parity_and_round_trip(minilm_folder: Path, tmp_path: Path) -> None:
    folder = make_classifier(minilm_folder, tmp_path / "rm")
    check(folder)
    scorer = FullScorer.from_name(folder, OPTIONS, name="mine")
    scores = scorer.score(SAMPLES)
    ensemble = RewardEnsemble((scorer,), fit_normaliser(scores, np.zeros(len(SAMPLES))), mean())
    saved = ensemble.save_pretrained(tmp_path / "run")
    again = RewardEnsemble.from_pretrained(saved, device="cpu")
    assert again.names == ("mine",)
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores)
    other = {"config.json": {"sha256": "0" * 64, "bytes": 1}}
    rewrite_json(saved / "members/0/member.json", {"files": other})
    record_digests(saved)
    with pytest.raises(ModelError, match=r"the backbone in .* changed after it was saved"):
        RewardEnsemble.from_pretrained(saved)


def test_a_missing_head_is_an_error(minilm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 outputs"):
        FullScorer.from_name(minilm_folder, OPTIONS)
    for file in minilm_folder.iterdir():
        if file.name != "config.json" and file.is_file():
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((minilm_folder / "config.json").read_text())
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(ModelError, match="classifier"):
        FullScorer.from_name(tmp_path, OPTIONS)


@pytest.mark.slow
def test_a_decoders_parity_where_pad_is_eos(smollm2_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(smollm2_folder).eos_token
    check(make_classifier(smollm2_folder, tmp_path / "rm", pad=eos))
