"""Custom code of a model runs only where the caller names the model and the code's digest."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble, Sample, TrunkOptions, combine, train
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.data import Preference, Preferences
from ensemble_rm.errors import CustomCodeError, EnsembleRMError, OptionError
from ensemble_rm.members import FullRecipe, FullScorer, ImplicitScorer, RemoteScorer
from ensemble_rm.members.backbone.checkpoint import locate, read_shape
from ensemble_rm.members.backbone.custom_code import allowed_code, code_digest

MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

with Path({marker!r}).open("a") as file:
    file.write("ran ")

class CustomConfig(LlamaConfig):
    model_type = "custom_llama"

class CustomModel(LlamaModel):
    config_class = CustomConfig

class CustomCausal(LlamaForCausalLM):
    config_class = CustomConfig

class CustomClassifier(LlamaForSequenceClassification):
    config_class = CustomConfig
"""
AUTO_MAP = {
    "AutoConfig": "custom.CustomConfig",
    "AutoModel": "custom.CustomModel",
    "AutoModelForCausalLM": "custom.CustomCausal",
    "AutoModelForSequenceClassification": "custom.CustomClassifier",
}
OPTIONS = TrunkOptions(max_length=32, device="cpu")
SAMPLES = [Sample("Who are you?", "A fox of the woods." * n) for n in (1, 2, 3)]


class NoQuestions(io.StringIO):
    """Standard input of a program that nobody watches."""

    def read(self, *_: Any) -> str:
        raise AssertionError("a library call read standard input")

    readline = read


@pytest.fixture(autouse=True)
def _unattended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdin", NoQuestions())
    # Where transformers copies custom code to, so that no test finds another's copy.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget_custom_modules()


def forget_custom_modules() -> None:
    """Remove what was imported, as a new process would."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "transformers_modules":
            del sys.modules[name]


@pytest.fixture
def custom(tiny_policy: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model with code of its own, and the file that its code writes when it runs."""
    folder, marker = tmp_path / "custom", tmp_path / "marker"
    shutil.copytree(tiny_policy, folder)
    (folder / "custom.py").write_text(MODEL.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom_llama", "auto_map": AUTO_MAP, "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def pairs(n: int, *, offset: int = 0) -> Preferences:
    rng = np.random.default_rng(offset)
    texts = ["a fox", "the woods", "nothing", "a bird of prey", "some rain"]
    chosen = [" ".join(rng.choice(texts, 3)) for _ in range(2 * n)]
    rows = [Preference(f"say {offset + i}", chosen[2 * i], chosen[2 * i + 1]) for i in range(n)]
    return Preferences(tuple(rows), "rows")


OPENINGS: dict[str, Callable[[Path], object]] = {
    "shape": lambda folder: read_shape(locate(folder)),
    "full": lambda folder: FullScorer.from_name(folder, OPTIONS),
    "implicit": lambda folder: ImplicitScorer.from_names(
        folder, folder, replace(OPTIONS, template="plain")
    ),
    "train": lambda folder: train(
        pairs(8), pairs(4, offset=50), backbone=folder, members=2, options=OPTIONS, cache_dir=None
    ),
    "combine": lambda folder: combine({"m": folder}, pairs(4), options=OPTIONS),
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_custom_code_is_a_named_error(opening: str, custom: tuple[Path, Path]) -> None:
    folder, marker = custom
    with pytest.raises(CustomCodeError, match=code_digest(folder)) as raised:
        OPENINGS[opening](folder)
    assert "custom.CustomModel" in str(raised.value)
    assert not marker.exists()


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}])
def test_a_tokenizers_code_is_an_error_too(
    config: dict[str, str], custom: tuple[Path, Path]
) -> None:
    folder, marker = custom
    model = json.loads((folder / "config.json").read_text())
    del model["auto_map"]
    (folder / "config.json").write_text(json.dumps(model | {"model_type": "llama"} | config))
    text = json.loads((folder / "tokenizer_config.json").read_text())
    text |= {"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["custom.Unheard", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(text))
    # transformers may know a tokenizer for this type of model; then none of the code is needed.
    with suppress(EnsembleRMError):
        FullScorer.from_name(folder, OPTIONS)
    remote = RemoteScorer(
        "http://gpu:1", protocol="openrlhf", name="m", template="chat", tokenizer=folder
    )
    with pytest.raises(EnsembleRMError):
        remote.score(SAMPLES)
    assert not marker.exists()


def test_code_that_transformers_does_not_need_does_not_run(custom: tuple[Path, Path]) -> None:
    """Many models bring code that transformers has adopted since: they load without it."""
    folder, marker = custom
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    ensemble = OPENINGS["train"](folder)
    assert isinstance(ensemble, RewardEnsemble)
    assert not marker.exists()


def test_a_named_model_trains_and_loads_and_its_saved_files_allow_nothing(
    custom: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, marker = custom
    trust = [f"{folder}@{code_digest(folder)}"]
    parts = (pairs(8), pairs(4, offset=50))
    options = {"backbone": folder, "members": 2, "options": OPTIONS, "cache_dir": None}
    ensemble = train(*parts, **options, out=tmp_path / "run", trust_remote_code=trust)
    assert marker.exists()
    assert ensemble.provenance["backbone"]["code"] == code_digest(folder)
    scores = ensemble.score(SAMPLES).raw
    marker.unlink()
    forget_custom_modules()
    with pytest.raises(CustomCodeError, match="--trust-remote-code"):
        RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu").score(SAMPLES)
    assert not marker.exists()
    again = RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu", trust_remote_code=trust)
    np.testing.assert_allclose(again.score(SAMPLES).raw, scores, rtol=1e-6)
    assert marker.exists()
    with pytest.raises(CustomCodeError, match="'head', 'branch' or 'lora'"):
        train(
            *parts,
            **options | {"recipe": FullRecipe()},
            out=tmp_path / "full",
            trust_remote_code=trust,
        )


def test_the_permission_is_for_one_model_at_one_digest(
    custom: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, marker = custom
    digest = code_digest(folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert allowed_code(folder, folder, [f"{folder}@{digest}"]) == digest
    assert allowed_code(other, other, [f"{folder}@{digest}"]) is None
    assert allowed_code("a/b", folder, [f"a/b@{digest}", f"c/d@{'0' * 64}"]) == digest
    assert allowed_code("a/b", folder, f"a/b@{digest}") == digest
    (folder / "inner").mkdir()
    (folder / "inner" / "more.py").write_text("x = 1\n")
    with pytest.raises(CustomCodeError, match=f"not {digest}"):
        locate(folder, trust_remote_code=[f"{folder}@{digest}"])
    assert not marker.exists()


def test_code_elsewhere_has_no_digest(custom: tuple[Path, Path]) -> None:
    folder, _ = custom
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "stranger/code--custom.CustomModel"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CustomCodeError, match="stranger/code--custom"):
        locate(folder, trust_remote_code=[f"{folder}@{code_digest(folder)}"])


@pytest.mark.parametrize("trust", [True, ["a/b"], ["a/b@1234"], ["@" + "0" * 64]])
def test_a_permission_without_a_digest_is_an_error(trust: Any, minilm_folder: Path) -> None:
    with pytest.raises(OptionError, match="MODEL@DIGEST"):
        locate(minilm_folder, trust_remote_code=trust)


def test_a_piped_yes_runs_nothing(custom: tuple[Path, Path], tmp_path: Path) -> None:
    """``yes | ensemble-rm score …`` used to run the model's code."""
    folder, marker = custom
    scorer = FullScorer(locate(folder), OPTIONS, name="m")
    run = RewardEnsemble((scorer,), Normaliser.identity(1), mean()).save_pretrained(
        tmp_path / "run"
    )
    row = {"prompt": "Hi", "completion": "Hello"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    command = ["score", str(run), f"--data={tmp_path / 'samples.jsonl'}", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "ensemble_rm", *command],
        input="y\n" * 100,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 4, done.stderr
    assert "--trust-remote-code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    trust = f"--trust-remote-code={folder}@{code_digest(folder)}"
    out = tmp_path / "scores.jsonl"
    assert main([*command, trust, f"--out={out}"]) == 0
    assert marker.exists()
