"""The reward function in processes that TRL's own launchers start: its command line, two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.members import HeadScorer
from ensemble_rm.rl import PinnedEnsemble, trl_reward
from ensemble_rm.rl.trl import version_number
from tests.support import CHECKOUT, SUPPORT

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("small_folder", ["bert"], indirect=True)]


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def run(command: list[str], cwd: Path) -> None:
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_trls_command_line_takes_the_file_that_ours_writes(
    tiny_policy: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "hh_reward.py"
    options = ["--device", "cpu", "--aggregator", "lcb", "--kappa", "1.0"]
    assert main(["init-reward", "trl", str(folder), *options, "--out", str(out)]) == 0
    data = tmp_path / "prompts"
    data.mkdir()
    rows = [{"prompt": prompt} for prompt in ["Say hello", "Say no", "Why"] * 2]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "model_name_or_path": tiny_policy,
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "reward_funcs": "hh_reward.reward",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
    }
    told = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    run(["-m", "trl.cli.main", "grpo", *told], tmp_path)
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "reward" in row]
    version = version_number(trl_reward(PinnedEnsemble(folder, device="cpu")).pinned.version)
    assert len(logged) == 2
    for row in logged:
        assert row["reward"] == pytest.approx(row["rewards/ensemble/mean"])
        assert row["ensemble/version"] == version and row["ensemble/failed"] == 0


def test_two_ranks_are_one_run(tiny_policy: Path, folder: Path, tmp_path: Path) -> None:
    """Groups of four are split between the ranks; the second alone has an alarm, at step 2 of 3."""
    pytest.importorskip("trl")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(SUPPORT / "trl_rank.py"), str(tiny_policy), str(folder), str(tmp_path), "1"]
    run([*launcher, *script], tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["ranks"] for rank in ranks] == [2, 2]
    assert [rank["step"] for rank in ranks] == [2, 2]
    logged = [row for row in ranks[0]["logs"] if "reward" in row]
    assert [row["monitor/alarms"] for row in logged] == [0, 0.5]
    ensemble = RewardEnsemble.from_pretrained(folder, device="cpu")
    steps = zip(*(zip(r["calls"], r["records"], strict=True) for r in ranks), strict=True)
    for row, parts in zip(logged, steps, strict=True):
        check_group(row, [call for call, _ in parts], ensemble)
        for name in ("kl", "log_length", "length_controlled"):
            wanted = np.mean([record[name] for _, record in parts])
            assert row[f"monitor/{name}"] == pytest.approx(wanted, abs=1e-6)
    assert logged[1]["monitor/kl"] > 0


def check_group(row: Any, calls: list[Any], ensemble: RewardEnsemble) -> None:
    """Hold a split group's rewards, and what was logged of them, against the whole group's."""
    samples = [Sample(*said) for call in calls for said in call["samples"]]
    assert [len(call["samples"]) for call in calls] == [2, 2]
    assert len({sample.prompt for sample in samples}) == 1
    whole = ensemble.score(samples)
    found = [reward for call in calls for reward in call["rewards"]]
    np.testing.assert_allclose(found, whole.reward, rtol=0, atol=1e-5)
    assert row["rewards/ensemble/mean"] == pytest.approx(whole.reward.mean(), abs=1e-5)
    assert row["rewards/ensemble/std"] == pytest.approx(whole.reward.std(ddof=1), abs=1e-4)
    assert row["ensemble/member_std"] == pytest.approx(whole.std.mean(), abs=1e-4)
