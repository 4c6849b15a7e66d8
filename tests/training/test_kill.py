"""A command that is killed goes on: the real process, the real signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble, Sample, load_preferences
from ensemble_rm.demo.data import FILE

# The command, with checkpoints as soon as there is something to keep: on a fast machine training
# would be over before the first of them.
COMMAND = """
import sys
from ensemble_rm.cli.main import main
from ensemble_rm.members.learning.loop import TrainingLoop
assert TrainingLoop.checkpoint_seconds == 1.0
TrainingLoop.checkpoint_seconds = 0.1
sys.exit(main(sys.argv[1:]))
"""
SAMPLES = [Sample("Who are you?", "A fox " * n) for n in (1, 9, 3, 12)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small_folder", "kind", "more", "mark"),
    [
        (
            "bert",
            "head",
            ["--solver=adam", "--epochs=4000", "--patience=4000", "--weight-decay", "1"],
            "*/checkpoint*",
        ),
        ("llama", "branch", ["--epochs=150", "--patience=150", "--blocks=1"], "*/checkpoint*"),
        (
            "bert",
            "lora",
            ["--epochs=150", "--patience=150", "--blocks=1", "--warm-start"],
            "*/*/checkpoint*",
        ),
        (
            "llama",
            "full",
            ["--epochs=6", "--patience=6"],
            "*/*/trainer/checkpoint-*/trainer_state.json",
        ),
    ],
    indirect=["small_folder"],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    small_folder: Path, tmp_path: Path, kind: str, more: list[str], mark: str
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [pair.to_json() for pair in load_preferences(FILE)[:150]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out: str) -> list[str]:
        return [
            *[sys.executable, "-c", COMMAND, "train", f"--data={data}", f"--kind={kind}"],
            *[f"--backbone={small_folder}", f"--out={tmp_path / out / 'run'}", "--members=2"],
            *["--max-length=32", "--device=cpu", f"--cache-dir={tmp_path / 'cache'}", *more],
        ]

    subprocess.run(command("unbroken"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob(f".run.training{mark[1:]}")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/run").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    scores = [
        RewardEnsemble.from_pretrained(tmp_path / name / "run", device="cpu").score(SAMPLES).raw
        for name in ("unbroken", "killed")
    ]
    np.testing.assert_array_equal(*scores)
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert left == {"run", "run.parts", "run.train.yaml"}  # no checkpoint
