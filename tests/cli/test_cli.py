"""The command line, as its users call it: every command, dry runs, exit codes, no tracebacks."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble
from ensemble_rm.cli.main import exit_code, main
from ensemble_rm.cli.options import leaves
from ensemble_rm.cli.train import Train
from ensemble_rm.data.loading import load_preferences
from ensemble_rm.demo.data import FILE
from ensemble_rm.errors import (
    DigestMismatchError,
    EnsembleRMError,
    LockedError,
    RemoteError,
    StoreIntegrityError,
    UnknownVersionsError,
)
from ensemble_rm.members import member_kind, trained_kinds
from ensemble_rm.versions import Versions


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    rows = [pair.to_json() for pair in load_preferences(FILE)[:700]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = train_arguments(folder, minilm_folder)
    assert main(arguments) == 0
    return folder


def train_arguments(folder: Path, backbone: Path) -> list[str]:
    return [
        "train",
        f"--data={folder / 'pairs.jsonl'}",
        f"--backbone={backbone}",
        f"--out={folder / 'run'}",
        f"--cache-dir={folder / 'cache'}",
        *[
            "--members=2",
            "--max-length=96",
            "--device=cpu",
            "--json",
        ],
        *["--split", ".5", ".1", ".2", ".2"],
    ]


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_a_dry_run_makes_nothing(
    run_folder: Path, minilm_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = train_arguments(run_folder, minilm_folder)
    arguments += [f"--out={tmp_path / 'never'}", "--dry-run"]
    assert main(arguments) == 0
    found = said(capsys)
    assert found["dry_run"] and found["tokens"] > 0 and len(found["recipe"]["views"]) == 2
    assert main([argument for argument in arguments if argument != "--json"]) == 0
    text = capsys.readouterr().out
    assert f"{found['tokens']:,}" in text and f"{found['members']} of kind" in text
    assert not set("{}[]") & set(text) and "None" not in text
    assert not (tmp_path / "never").exists()


def test_every_part_of_a_recipe_can_be_given() -> None:
    options = {leaf.path[-1] for leaf in leaves(Train)}
    for kind in trained_kinds():
        recipe = {field.name for field in fields(member_kind(kind).recipe_class())}
        assert recipe - {"callbacks"} <= options  # objects, which no text names


@pytest.mark.parametrize("kind", ["branch", "lora", "full"])
def test_other_kinds_train_from_the_command_line(
    kind: str,
    run_folder: Path,
    small_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    few = tmp_path / "pairs.jsonl"
    rows = (run_folder / "pairs.jsonl").read_text().splitlines()
    few.write_text("\n".join(rows[:150]) + "\n")
    arguments = [
        *["train", f"--data={few}", f"--backbone={small_folder}", f"--kind={kind}", "--members=2"],
        *["--epochs=1", "--max-length=32", "--device=cpu", "--json", f"--out={tmp_path / 'run'}"],
        *[f"--cache-dir={tmp_path / 'cache'}"],
        *([] if kind == "full" else ["--blocks=1"]),
    ]
    assert main([*arguments, "--dry-run"]) == 0
    found = said(capsys)
    assert found["kind"] == kind
    assert (found["token_states_bytes"] > 0) == (kind != "full")
    more = {
        "branch": [],
        "lora": ["--rank=2", "--alpha=4", "--warm-start", "--diversity=0.1"],
        "full": ["--trainer-arg=dataloader_num_workers=0"],
    }[kind]
    assert main([*arguments, *more]) == 0
    assert len(said(capsys)["validation_nll"]) == 2
    assert main([*arguments, "--trainer-arg=seed=1"]) == 2
    assert "trainer" in capsys.readouterr().err


def test_train_writes_its_parts(run_folder: Path) -> None:
    parts = run_folder / "run.parts"
    keys = [load_preferences(parts / f"{name}.jsonl").prompt_keys for name in ("train", "test")]
    assert keys[0].isdisjoint(keys[1])


def test_calibrate_evaluate_compare_score(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, parts = str(run_folder / "run"), run_folder / "run.parts"
    judgments = f"--data={parts / 'calibration.jsonl'}"
    lcb = ["--aggregator=lcb", "--kappa=0.5"]
    assert main(["calibrate", run, judgments, *lcb, "--dry-run", "--json"]) in (0, 5)
    capsys.readouterr()
    assert main(["compare", run, f"--data={parts / 'test.jsonl'}"]) == 5
    assert "no calibration" in capsys.readouterr().err
    out = tmp_path / "calibrated"
    assert main(["calibrate", run, judgments, f"--out={out}", "--json"]) == 0
    assert said(capsys)["fit"]["temperature"] > 0
    assert main(["calibrate", run, judgments, f"--out={tmp_path / 'again'}"]) == 0
    assert f"--data {parts / 'test.jsonl'}\n" in capsys.readouterr().err

    report = tmp_path / "report"
    arguments = ["evaluate", str(out), f"--data={parts / 'test.jsonl'}", f"--report={report}"]
    assert main([*arguments, "--draws=20"]) == 0
    assert "▸ mean()" in capsys.readouterr().out
    assert {p.name for p in report.iterdir()} == {
        "evaluation.json",
        "evaluation.txt",
        "reliability.png",
        "risk_coverage.png",
    }

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "first": "Hello!", "second": "x"}) + "\n")
    assert main(["compare", str(out), f"--data={pairs}"]) == 0
    verdict = said(capsys)
    assert 0 < verdict["probability"] < 1 and verdict["epistemic"] >= 0
    pairs.write_text(json.dumps({"prompt": "Hi", "first": "Hello! " * 3000, "second": "x"}) + "\n")
    assert main(["compare", str(out), f"--data={pairs}"]) == 0
    assert re.search(r"^cut: +\d prompts?, 1 completion$", capsys.readouterr().err, re.MULTILINE)

    samples = tmp_path / "samples.jsonl"
    texts = ["Hello!", "x", "Good day to you."]
    rows = [{"prompt": "Hi", "completion": text} for text in texts]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = tmp_path / "scores.jsonl"
    assert main(["score", str(out), f"--data={samples}", *lcb, f"--out={scores}", "--json"]) == 0
    assert said(capsys)["aggregator"] == "lcb(kappa=0.5)"
    found = [json.loads(line) for line in scores.read_text().splitlines()]
    for row in found:
        a, b = row["members"].values()
        assert row["reward"] == pytest.approx((a + b) / 2 - 0.5 * abs(a - b) / 2)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    texts = {"Hi": ["Hello!", "x", "Good day to you."], "Bye": ["See you.", "y"]}
    rows = [{"prompt": p, "completion": c} for p, group in texts.items() for c in group]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::2] + rows[1::2]))
    return path


def test_rank_is_the_order_of_the_scores(
    run_folder: Path, samples: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(run_folder / "run")
    assert main(["score", run, f"--data={samples}"]) == 0
    rewards = [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert main(["rank", run, f"--data={samples}"]) == 0
    ranked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in ranked] == ["Hi", "Bye"]
    for line in ranked:
        group = [
            (row["completion"], reward)
            for row, reward in zip(rows, rewards, strict=True)
            if row["prompt"] == line["prompt"]
        ]
        best_first = sorted(group, key=lambda entry: -entry[1])
        assert line["completions"] == [completion for completion, _ in best_first]
        assert line["rewards"] == pytest.approx([reward for _, reward in best_first], abs=1e-6)
        assert [group[i][0] for i in line["positions"]] == line["completions"]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "Hi", "completion": "Hello! " * 3000}) + "\n")
    assert main(["rank", run, f"--data={long}"]) == 0
    assert re.search(r"^cut: +\d prompts?, 1 completion$", capsys.readouterr().err, re.MULTILINE)
    out = tmp_path / "best.jsonl"
    assert main(["rank", run, f"--data={samples}", "--top=1", f"--out={out}", "--json"]) == 0
    assert said(capsys)["prompts"] == 2
    best = [json.loads(line)["completions"] for line in out.read_text().splitlines()]
    assert best == [line["completions"][:1] for line in ranked]
    assert main(["rank", run, f"--data={samples}", "--top=0"]) == 2


def test_members_have_weights_by_name(
    run_folder: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_folder / "run")
    names = RewardEnsemble.from_pretrained(run, device="cpu").names
    words = ["score", run, f"--data={samples}", "--aggregator=mean"]
    weights = [f"--weight={names[0]}=3", f"--weight={names[1]}=1"]
    assert main([*words, *weights]) == 0
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        first, second = (row["members"][name] for name in names)
        assert row["reward"] == pytest.approx(0.75 * first + 0.25 * second)
    assert main([*words, weights[0]]) == 2
    assert f"no weight for {names[1]!r}" in capsys.readouterr().err
    assert main([*words[:-1], *weights]) == 2
    assert "--weight needs --aggregator" in capsys.readouterr().err


def test_a_run_writes_its_configuration_and_repeats_from_it(
    run_folder: Path, samples: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["score", str(run_folder / "run"), f"--data={samples}", f"--out={out}"]
    assert main([*words, "--aggregator=lcb", "--kappa=0.5"]) == 0
    heard = capsys.readouterr()
    config = tmp_path / "scores.jsonl.score.yaml"
    for line in ("read:     5 samples", f"saved:    {out}", f"config:   {config}", "next:     "):
        assert line in heard.err
    scores = out.read_text()
    out.unlink()
    assert main(["score", f"--config={config}"]) == 0
    assert out.read_text() == scores
    assert main(["score", f"--config={config}", "--kappa=0.6"]) == 0
    assert out.read_text() != scores


def test_verify_finds_a_changed_file(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    words = ["verify", str(run), "--device=cpu"]
    assert main([*words, "--json"]) == 0
    assert len(said(capsys)["checked"]) == 1
    Versions(run).adopt()
    assert main([*words, "--json"]) == 0
    assert [entry["version"] for entry in said(capsys)["checked"]] == [1, "current, loaded"]
    file = next((run / "versions" / "0001").rglob("members/**/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(words) == 14
    assert "1: the ensemble in " in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none")]) == 4


def test_repair_removes_what_a_killed_job_left(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder / "run", run)
    Versions(run).adopt()
    (run / "versions" / "0002").mkdir()  # damaged: without a description
    (run / "versions" / ".new-1-x").mkdir()
    before = sorted(run.rglob("*"))
    assert main(["versions", "repair", str(run), "--json"]) == 14
    assert said(capsys) == {"leftovers": [".new-1-x"], "unknown": [2], "repaired": False}
    assert sorted(run.rglob("*")) == before
    assert main(["versions", "repair", str(run), "--yes", "--json"]) == 0
    assert said(capsys)["aside"] == [2]
    assert len(list((run / "versions").glob(".aside-0002-*"))) == 1
    assert main(["versions", "repair", str(run)]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert Versions(run).current().number == 1
    assert main(["versions", "repair", str(tmp_path / "none")]) == 4


def test_methods_slices_and_subsets(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(run_folder / "run")
    rows = [p.to_json() for p in load_preferences(run_folder / "run.parts" / "calibration.jsonl")]
    names = ("a", "b", None)
    judged = tmp_path / "judged.jsonl"
    rows = [row | {"subset": names[i % 3]} for i, row in enumerate(rows)]
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibrate = ["calibrate", run, f"--data={judged}"]
    assert main([*calibrate, "--method=isotonic", "--dry-run", "--json"]) == 0
    found = said(capsys)
    assert found["method"] == "isotonic" and found["ties"] > 0
    assert found["fit"]["temperature"] > 0
    assert main([*calibrate, "--method=isotonic", "--dry-run"]) == 0
    assert "not for an RL reward" in capsys.readouterr().out
    assert main([*calibrate, "--method=best", "--dry-run"]) == 2
    assert main([*calibrate, "--method=power", "--slices", "--dry-run"]) == 2
    assert "works with method='temperature' only, not 'power'" in capsys.readouterr().err

    out = tmp_path / "sliced"
    assert main([*calibrate, "--slices", f"--out={out}"]) == 0
    assert "  a: T = " in capsys.readouterr().out
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Hi", "first": "Hello!", "second": "x"}
    asked = [row | {"subset": name} for name in ("a", None, "unheard of")]
    pairs.write_text("".join(json.dumps(one) + "\n" for one in asked))
    assert main(["compare", str(out), f"--data={pairs}"]) == 0
    said_of = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    slices = json.loads((out / "ensemble.json").read_text())["calibration"]["slices"]
    p = [one["probability"] for one in said_of]
    assert p[1] == pytest.approx(p[2])
    assert p[0] == pytest.approx(1 / (1 + np.exp(-said_of[0]["margin"] / slices[0]["temperature"])))
    assert main(["evaluate", str(out), f"--data={judged}", "--draws=5", "--json"]) == 0
    found = said(capsys)
    assert [one["name"] for one in found["subsets"]] == ["a", "b"]
    assert set(found["pooling_gain"]) == {"estimate", "low", "high"}


def test_a_tie_model(run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(run_folder / "run")
    rows = [p.to_json() for p in load_preferences(run_folder / "run.parts" / "calibration.jsonl")]
    judged = tmp_path / "judged.jsonl"
    calibrate = ["calibrate", run, f"--data={judged}", "--ties=davidson"]
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*calibrate, "--dry-run"]) != 0
    assert "is a tie" in capsys.readouterr().err
    tied = [row | {"tie": i % 4 == 0} for i, row in enumerate(rows)]
    judged.write_text("".join(json.dumps(row) + "\n" for row in tied))
    assert main([*calibrate, "--dry-run"]) == 0
    assert "ties by davidson: ν = " in capsys.readouterr().out
    out = tmp_path / "tied"
    assert main([*calibrate, f"--out={out}", "--json"]) == 0
    nu = said(capsys)["tie_model"]["nu"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "first": "Hello!", "second": "Hello!"}) + "\n")
    assert main(["compare", str(out), f"--data={pairs}"]) == 0
    assert said(capsys)["tie_probability"] == pytest.approx(nu / (2 + nu))


def test_a_baseline_needs_references(
    run_folder: Path, minilm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*train_arguments(run_folder, minilm_folder), "--baseline"]
    assert main([*arguments, f"--out={tmp_path / 'run'}"]) == 6
    assert "reference" in capsys.readouterr().err
    rows = [p.to_json() | {"reference": "I see."} for p in load_preferences(FILE)[:300]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*train_arguments(tmp_path, minilm_folder), "--baseline"]) == 0
    capsys.readouterr()
    samples = tmp_path / "samples.jsonl"
    row = {"prompt": "Hi", "completion": "I see.", "reference": "I see."}
    samples.write_text(json.dumps(row) + "\n")
    assert main(["score", str(tmp_path / "run"), f"--data={samples}"]) == 0
    offset = json.loads((tmp_path / "run" / "ensemble.json").read_text())["normaliser"]
    expected = [-o / s for o, s in zip(offset["offset"], offset["scale"], strict=True)]
    assert list(said(capsys)["members"].values()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "nowhere", "--data=none.jsonl"], 3, "no such file"),
        (["score", "nowhere", "--data={samples}"], 4, "no ensemble"),
        (["score", "nowhere", "--data={samples}", "--kappa=1"], 2, "--aggregator"),
        (["score", "nowhere", "--data={samples}", "--aggregator=best"], 2, "best"),
        (["score", "nowhere", "--data={bad}"], 3, ":1:"),
        (["train", "--data={bad}", "--backbone=./x", "--out=y"], 3, "usable"),
        (["train", "--data={pairs}", "--backbone=./x", "--out=y"], 4, "no such folder: ./x"),
        (["train", "--data={pairs}", "--backbone=./x", "--out=y", "--epochs=0"], 2, "epochs"),
    ],
)
def test_mistakes_are_named_without_a_traceback(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"samples": tmp_path / "s.jsonl", "bad": tmp_path / "b.jsonl"}
    files["samples"].write_text(json.dumps({"prompt": "Hi", "completion": "x"}) + "\n")
    files["bad"].write_text("nonsense\n")
    files["pairs"] = run_folder / "pairs.jsonl"
    filled = [argument.format(**files) for argument in arguments]
    assert main([*filled, "--json"]) == code
    heard = capsys.readouterr()
    assert message in heard.err
    assert "Traceback" not in heard.err
    assert json.loads(heard.out)["exit_code"] == code


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "nowhere", "--data=none.jsonl", "--out={out}"],
        ["make-pairs", "nowhere", "--data=none.jsonl", "--out={out}"],
        ["select", "nowhere", "--pool=none.jsonl", "--budget=3", "--out={out}"],
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_read(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Members on other servers may cost money."""
    filled = [argument.format(out=tmp_path) for argument in arguments]
    assert main(filled) == 2
    assert "is a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 0)])
def test_who_stops_it_sees_no_traceback(
    error: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ensemble_rm.cli.precision.Precision.run", stop)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    assert main(["precision", "run", "--data=x"]) == code
    assert said.closed if error is BrokenPipeError else said.getvalue().endswith("interrupted\n")


def test_bad_rows_stop_unless_skipped(
    run_folder: Path, minilm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (run_folder / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(good + "nonsense\n")
    arguments = [*train_arguments(tmp_path, minilm_folder), "--dry-run"]
    assert main(arguments) == 3
    assert ":701: not JSON" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    assert ":701: not JSON" in capsys.readouterr().err


def kinds(base: type[EnsembleRMError]) -> list[type[EnsembleRMError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


def test_every_error_has_an_exit_code() -> None:
    for kind in kinds(EnsembleRMError):
        codes = (13,) if issubclass(kind, LockedError) else range(2, 7)
        codes = (7,) if issubclass(kind, RemoteError) else codes
        codes = (14,) if issubclass(kind, DigestMismatchError | UnknownVersionsError) else codes
        codes = (15,) if issubclass(kind, StoreIntegrityError) else codes
        assert exit_code(kind.__new__(kind)) in codes, kind  # some take more than a message


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ensemble_rm", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("ensemble-rm ")


@pytest.mark.slow
def test_the_demo(tmp_path: Path, minilm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", f"--out={tmp_path / 'demo'}", "--json"]) == 0
    found = said(capsys)
    assert found["simulated_annotator"]
    truth = found["against_truth"]
    assert truth["nll_of_the_truth"] < truth["nll_after"] < 0.6931
    own = next(row for row in found["evaluation"]["rows"] if row["name"] == "mean()")
    assert own["before"]["accuracy"]["estimate"] >= 0.65
    assert set(found["hacks"]["fooled"]) >= {"one head", "mean", "minimum"}
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == len(found["pictures"])
    assert 'src="http' not in page and "href=" not in page  # needs no other file
    for picture in found["pictures"]:
        assert Path(picture).stat().st_size > 10_000
