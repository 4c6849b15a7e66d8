"""Benchmarks: each parses, and each committed result has the promised shape."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import Message, Preference, Preferences, Sample
from ensemble_rm.members.backbone.checkpoint import load_tokenizer
from ensemble_rm.members.encoding import TextEncoder
from ensemble_rm.metrics import ece

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(p for p in FOLDER.glob("*.py") if "make_parser(" in p.read_text(encoding="utf-8"))
SCRIPTS.remove(FOLDER / "common.py")


@pytest.fixture
def vs_rewarduq(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module; benchmarks are scripts, not a package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("vs_rewarduq")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_does(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert "--quick" in done.stdout and "--json" in done.stdout


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_result_has_its_shape(file: Path) -> None:
    said = json.loads(file.read_text())
    assert set(said) == {"name", "command", "commit", "machine", "figures"}
    assert said["name"] == file.stem
    assert (FOLDER / f"{file.stem}.py").exists()
    assert said["figures"]
    for name, figure in said["figures"].items():
        assert set(figure) == {"median", "low", "high", "n"}, name


def test_the_documents_tables_are_those_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    tables = importlib.import_module("tables")
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    whole = (FOLDER.parent / "docs" / "measured.md").read_text(encoding="utf-8")
    assert tables.preferences(["views"]) in readme, "put the output of benchmarks/tables.py there"
    assert tables.claims() in readme, "put the output of benchmarks/tables.py there"
    assert tables.preferences() in whole, "put the output of benchmarks/tables.py there"
    assert tables.kinds() in whole, "put the output of benchmarks/tables.py there"


@pytest.mark.slow
def test_the_quick_calibration_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = FOLDER / "calibration_fit.py"
    subprocess.run([sys.executable, str(script), "--quick", f"--json={out}"], check=True)
    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == {"netcal_ratio", "nll_gap"}
    assert abs(figures["nll_gap"]["median"]) < 1e-6


def test_the_peers_ece_is_ours(vs_rewarduq: Any) -> None:
    for seed in range(20):
        p = np.random.default_rng(seed).beta(2, 2, 300)
        assert vs_rewarduq.ece_with_flips(p) == pytest.approx(ece(p, np.ones(300)), abs=1e-12)


def test_parts_of_a_seed_share_no_prompt(vs_rewarduq: Any) -> None:
    pairs = Preferences(tuple(Preference(f"prompt {i // 2}", "yes", "no") for i in range(200)))
    tested = []
    for fold in range(5):
        rows = vs_rewarduq.parts(pairs, fold, 5)
        assert sorted(np.concatenate(list(rows.values()))) == list(range(200))
        prompts = [pairs.take(part).prompt_keys for part in rows.values()]
        assert sum(map(len, prompts)) == len(pairs.prompt_keys)
        tested.append(rows["test"])
    assert sorted(np.concatenate(tested)) == list(range(200))


def test_the_peer_reads_the_tokens_that_ours_reads(
    vs_rewarduq: Any, minilm_folder: Path, tmp_path: Path
) -> None:
    import rewarduq_peer

    theirs = load_tokenizer(rewarduq_peer.prepare_backbone(minilm_folder, tmp_path / "backbone"))
    ours = TextEncoder(load_tokenizer(minilm_folder), max_length=512)
    talk = (Message("user", "Hello, you."), Message("assistant", "Hi!"), Message("user", "Why?"))
    for prompt in (talk, talk[:1]):
        (row,) = vs_rewarduq.to_rows(Preferences((Preference(prompt, "So.", "No."),)))
        asked = theirs.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        answer = [{"role": "assistant", "content": row["chosen"]}]
        whole = theirs.apply_chat_template(row["prompt"] + answer, tokenize=False)
        assert whole.startswith(asked)
        read = theirs(asked)["input_ids"] + theirs(whole[len(asked) :])["input_ids"]
        assert read == ours.encode([Sample(prompt, "So.")])[0].ids


@pytest.mark.slow
def test_the_quick_benchmark_against_rewarduq_runs(
    vs_rewarduq: Any, shared_data: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    named = os.environ.get("REWARDUQ_PYTHON")
    if not named and not vs_rewarduq.peer_is_installed():
        pytest.skip("no environment with RewardUQ; benchmarks/vs_rewarduq.py --quick makes it")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(FOLDER / "vs_rewarduq.py"), "--quick", f"--json={out}"]
    data = shared_data / "hh_rlhf.jsonl"
    more = [f"--data={data}", f"--backbone={minilm_folder}"]
    more += [f"--peer-python={named}"] if named else []
    subprocess.run([*command, *more], check=True)
    figures = json.loads(out.read_text())["figures"]
    for name in ("accuracy", "nll", "ece"):
        assert {f"{name}_ours", f"{name}_rewarduq", f"{name}_raw_ours"} <= set(figures)
    assert {"wall_ratio", "score_ratio", "wall_ratio_bfloat16"} <= set(figures)
