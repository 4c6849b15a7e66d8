"""A saved ensemble loads as it was saved, or says which file has changed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ensemble_rm import RewardEnsemble, Sample, Versions
from ensemble_rm.cli.main import main
from ensemble_rm.errors import DigestMismatchError, OptionError, UnverifiedWarning
from ensemble_rm.file_digests import SMALL, FileCheck, files_below, seal, unseal
from ensemble_rm.members.backbone import checkpoint
from tests.support.saved_files import forget_digests, rewrite_json

SAVED = Path(__file__).resolve().parent.parent / "fixtures" / "saved_0_1"
SAMPLES = [Sample("What is soap?", "A salt of a fatty acid."), Sample("Why?", "No idea.")]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ensemble of heads that this version has saved, next to its backbone."""
    shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedWarning)
        old = RewardEnsemble.from_pretrained("head-isotonic", device="cpu")
    return old.save_pretrained(tmp_path / "run")


def backbone_of(run: Path) -> Path:
    return Path(json.loads((run / "members/0/member.json").read_text())["backbone"])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight of a head": lambda run: flip_a_bit(next(run.rglob("members/**/*.safetensors"))),
    "a member's settings": lambda run: rewrite_json(run / "members/0/member.json", {"hidden": 3}),
    "the normaliser": lambda run: rewrite_json(
        run / "ensemble.json", {"normaliser": {"offset": [0.0], "scale": [2.0], "baseline": False}}
    ),
    "the backbone's weights": lambda run: flip_a_bit(backbone_of(run) / "model.safetensors"),
    "the backbone's activation": lambda run: rewrite_json(
        backbone_of(run) / "config.json", {"hidden_act": "relu"}
    ),
    "the backbone's norm": lambda run: rewrite_json(
        backbone_of(run) / "config.json", {"layer_norm_eps": 0.1, "rms_norm_eps": 0.1}
    ),
    "the tokenizer": lambda run: flip_a_bit(backbone_of(run) / "tokenizer.json"),
    "a new template": lambda run: flip_a_bit(
        shutil.copy(backbone_of(run) / "tokenizer.json", backbone_of(run) / "chat_template.jinja")
    ),
    "a missing member": lambda run: next(run.rglob("members/**/*.safetensors")).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named(
    run: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = RewardEnsemble.from_pretrained(run, device="cpu").score(SAMPLES).reward
    again = RewardEnsemble.from_pretrained(run, device="cpu").score(SAMPLES).reward
    np.testing.assert_array_equal(before, again)
    assert main(["verify", str(run)]) == 0
    CHANGES[change](run)
    for verify in ("full", "stat"):  # all of these files are small
        with pytest.raises(DigestMismatchError, match="changed after it was saved"):
            RewardEnsemble.from_pretrained(run, device="cpu", verify=verify)  # type: ignore[arg-type]
    capsys.readouterr()
    assert main(["verify", str(run)]) == 14
    assert "changed after it was saved" in capsys.readouterr().err


def test_a_change_between_the_check_and_the_first_score_is_found(run: Path) -> None:
    ensemble = RewardEnsemble.from_pretrained(run, device="cpu")
    flip_a_bit(backbone_of(run) / "model.safetensors")
    with pytest.raises(DigestMismatchError, match="the backbone"):
        ensemble.score(SAMPLES)


def test_version_1_does_not_follow_the_plain_files(run: Path) -> None:
    versions = Versions(run)
    versions.adopt()
    folder = versions.ensemble_folder(versions.current())
    for name in files_below(folder):
        assert (folder / name).stat().st_ino != (run / name).stat().st_ino, name
    scores = RewardEnsemble.from_pretrained(run, device="cpu").score(SAMPLES).reward
    for name in files_below(run / "members"):
        (run / "members" / name).write_bytes(b"overwritten in place")
    again = RewardEnsemble.from_pretrained(run, device="cpu").score(SAMPLES).reward
    np.testing.assert_array_equal(again, scores)
    flip_a_bit(next((folder / "members").rglob("*.safetensors")))
    with pytest.raises(DigestMismatchError):
        RewardEnsemble.from_pretrained(run, device="cpu")
    assert main(["verify", str(run)]) == 14


def test_an_ensemble_without_digests_loads_and_says_so(run: Path) -> None:
    forget_digests(run)
    with pytest.warns(UnverifiedWarning, match="without digests") as said:
        ensemble = RewardEnsemble.from_pretrained(run, device="cpu")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardEnsemble.from_pretrained(ensemble.save_pretrained(run), device="cpu")


def test_stat_hashes_small_files_and_compares_the_size_of_large_ones(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(SMALL + 1))
    recorded = FileCheck().digests(tmp_path, ["large.safetensors"])
    flip_a_bit(large)
    FileCheck("stat").compare(tmp_path, recorded, what="it")  # what it does not see
    with pytest.raises(DigestMismatchError, match="has SHA-256"):
        FileCheck("full").compare(tmp_path, recorded, what="it")
    large.write_bytes(bytes(SMALL + 2))
    with pytest.raises(DigestMismatchError, match=f"has {SMALL + 2} bytes, not {SMALL + 1}"):
        FileCheck("stat").compare(tmp_path, recorded, what="it")
    with pytest.raises(OptionError, match="verify must be one of"):
        FileCheck("none")  # type: ignore[arg-type]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    row=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "sha256"),
        st.none() | st.booleans() | st.integers() | st.text(),
        min_size=1,
    ),
    data=st.data(),
)
def test_a_sealed_object_is_as_it_was_sealed(row: dict[str, object], data: st.DataObject) -> None:
    path = Path("x.json")
    sealed = json.loads(json.dumps(seal(row)))
    assert unseal(sealed, path) == (row, True)
    assert unseal(row, path) == (row, False)
    name = data.draw(st.sampled_from(sorted(row)))
    changed = data.draw(st.text() | st.integers())
    if json.dumps(changed) != json.dumps(row[name]):
        with pytest.raises(DigestMismatchError, match=r"x\.json"):
            unseal({**sealed, name: changed}, path)


def test_a_hub_model_is_loaded_at_its_commit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "snapshots" / commit
    shutil.copytree(backbone_of(run), cached)
    asked: list[str | None] = []

    def download(name: str, revision: str | None) -> Path:
        asked.append(revision)
        return cached

    monkeypatch.setattr(checkpoint, "_download", download)
    backbone = checkpoint.locate("some/model", cache_dir=None)
    assert backbone.revision == commit
    same = checkpoint.locate_same(
        "some/model", backbone.digest, files=backbone.files, revision=backbone.revision
    )
    assert same == backbone and asked == [None, commit]
