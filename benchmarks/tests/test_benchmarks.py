"""Each benchmark prints its help, and each committed result has the documented shape."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.quality import rewarduq_peer, vs_rewarduq
from benchmarks.shared import common
from ensemble_rm import Message, Preference, Preferences, Sample
from ensemble_rm.members.backbone.checkpoint import load_tokenizer
from ensemble_rm.members.encoding import TextEncoder
from ensemble_rm.metrics import ece

FOLDER = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path
    for path in FOLDER.glob("[a-z]*/[a-z]*.py")
    if path.parent.name not in ("shared", "tests")
    and "make_parser(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_prints_its_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: each would import torch again in its own.
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--quick" in printed and "--json" in printed


def test_a_benchmark_runs_from_any_folder(tmp_path: Path) -> None:
    script = FOLDER / "speed" / "calibration_fit.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, env=environment, check=True
    )


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_result_has_its_shape(file: Path) -> None:
    result = json.loads(file.read_text())
    # Results before December 2026 do not say whether the tree had uncommitted changes.
    assert set(result) | {"dirty"} == {"name", "command", "commit", "dirty", "machine", "figures"}
    assert result["name"] == file.stem
    script = tables.script_of(file.stem)
    assert result["command"].split()[:2] == ["python", script.as_posix()]
    assert result["figures"]
    for name, figure in result["figures"].items():
        assert set(figure) == {"median", "low", "high", "n", "interval"}, name
        assert figure["interval"] != common.SINGLE or figure["low"] == figure["high"], name


def test_figures_are_written_with_their_interval_and_the_state_of_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    script = FOLDER / "speed" / "scoring.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", f"--json={out}"])
    monkeypatch.setattr(common, "dirty", lambda: True)
    figures = common.Figures(common.make_parser("").parse_args())
    figures.add_repeats("ratio", [3.0, 1.0, 2.0], over="seeds")
    figures.add_repeats("once", [3.0])
    figures.add("gain", 0.5, 0.1, 0.9, 40, interval=common.OVER_PROMPTS)
    figures.write()
    result = json.loads(out.read_text())
    assert result["command"] == "python benchmarks/speed/scoring.py --quick"
    assert result["dirty"] is True
    assert result["figures"] == {
        "ratio": {"median": 2, "low": 1, "high": 3, "n": 3, "interval": "range over seeds"},
        "once": {"median": 3, "low": 3, "high": 3, "n": 1, "interval": common.SINGLE},
        "gain": {
            "median": 0.5,
            "low": 0.1,
            "high": 0.9,
            "n": 40,
            "interval": "95 % bootstrap over prompts",
        },
    }


def test_the_documents_tables_are_those_of_the_figures() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    whole = (FOLDER.parent / "docs" / "measured.md").read_text(encoding="utf-8")
    assert tables.headlines() in readme, "put the output of benchmarks/tables.py there"
    for table in (tables.claims(), tables.preferences(), tables.kinds()):
        assert table in whole, "put the output of benchmarks/tables.py there"


@pytest.mark.slow
def test_the_quick_calibration_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = FOLDER / "speed" / "calibration_fit.py"
    subprocess.run([sys.executable, str(script), "--quick", f"--json={out}"], check=True)
    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == {"netcal_ratio", "nll_gap"}
    assert abs(figures["nll_gap"]["median"]) < 1e-6


def test_the_peers_ece_is_ours() -> None:
    for seed in range(20):
        p = np.random.default_rng(seed).beta(2, 2, 300)
        assert vs_rewarduq.ece_with_flips(p) == pytest.approx(ece(p, np.ones(300)), abs=1e-12)


def test_parts_of_a_seed_share_no_prompt() -> None:
    pairs = Preferences(tuple(Preference(f"prompt {i // 2}", "yes", "no") for i in range(200)))
    tested = []
    for fold in range(5):
        rows = vs_rewarduq.parts(pairs, fold, 5)
        assert sorted(np.concatenate(list(rows.values()))) == list(range(200))
        prompts = [pairs.take(part).prompt_keys for part in rows.values()]
        assert sum(map(len, prompts)) == len(pairs.prompt_keys)
        tested.append(rows["test"])
    assert sorted(np.concatenate(tested)) == list(range(200))


def test_the_peer_reads_the_tokens_that_ours_reads(minilm_folder: Path, tmp_path: Path) -> None:
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
    shared_data: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    python = os.environ.get("REWARDUQ_PYTHON")
    if not python and not vs_rewarduq.peer_is_installed():
        pytest.skip("no environment with RewardUQ; vs_rewarduq.py --quick makes it")
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(FOLDER / "quality" / "vs_rewarduq.py"),
        "--quick",
        f"--json={out}",
    ]
    data = shared_data / "hh_rlhf.jsonl"
    more = [f"--data={data}", f"--backbone={minilm_folder}"]
    more += [f"--peer-python={python}"] if python else []
    subprocess.run([*command, *more], check=True)
    figures = json.loads(out.read_text())["figures"]
    for name in ("accuracy", "nll", "ece"):
        assert {f"{name}_ours", f"{name}_rewarduq", f"{name}_raw_ours"} <= set(figures)
    assert {"wall_ratio", "score_ratio", "wall_ratio_bfloat16"} <= set(figures)
