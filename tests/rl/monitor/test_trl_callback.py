"""The monitor inside TRL's trainers: what it adds to their logs, and that it changes no run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import Message, RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members import HeadScorer
from ensemble_rm.rl import OverOptimisationMonitor, PinnedEnsemble, trl_reward
from tests.support.trl_runs import tiny_run

pytest.importorskip("trl")
one_backbone = pytest.mark.parametrize("small_folder", ["bert"], indirect=True)


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def watched(policy: Path, folder: Path, tmp_path: Path, **options: Any) -> tuple[Any, Any]:
    """Return a trainer of a LoRA policy and the callback that is attached to it."""
    from datasets import Dataset
    from peft import LoraConfig

    from ensemble_rm.rl.monitor.trl_callback import MonitorCallback

    settings = {name: options.pop(name) for name in ("kl_every", "records") if name in options}
    reward = trl_reward(PinnedEnsemble(folder, device="cpu"))
    data = Dataset.from_dict({"prompt": ["Say hello", "Say no", "Why"] * 2})
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny_run(policy, reward, tmp_path, data, lora=lora, learning_rate=0.5, **options)
    monitor = OverOptimisationMonitor(reward.pinned.ensemble)
    callback = MonitorCallback(reward, monitor, **settings)
    return trainer, callback


@pytest.mark.slow
@one_backbone
def test_reporters_see_its_figures_averaged_as_trls_are(
    tiny_policy: Path, folder: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen.append(dict(given["logs"]))

    class Gold(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            callback.monitor.check_gold(float(state.global_step))

    trainer, callback = watched(
        tiny_policy, folder, tmp_path, kl_every=1, max_steps=4, logging_steps=2
    )
    trainer.add_callback(Reporter())  # as TensorBoard's and W&B's are: before anyone attaches
    callback.attach(trainer)
    trainer.add_callback(Gold())
    trainer.train()
    records = callback.monitor.records
    assert len(records) == 4 and len(seen) == 3
    for i, logs in enumerate(seen[:2]):
        part = records[2 * i : 2 * i + 2]
        for name in ("kl", "gold", "log_length", "length_controlled"):
            wanted = np.mean([getattr(record, name) for record in part])
            assert logs[f"monitor/{name}"] == pytest.approx(wanted)
        slopes = [record.length_slopes["minimum"] for record in part]
        known = [slope for slope in slopes if math.isfinite(slope)]
        if known:
            assert logs["monitor/length_slope/minimum"] == pytest.approx(np.mean(known))
        assert logs["monitor/alarms"] == 0 and "monitor/outside_range" not in logs
        assert trainer.state.log_history[i]["monitor/kl"] == logs["monitor/kl"]
    assert not any(name.startswith("monitor/") for name in seen[2])  # the run's summary


@pytest.mark.slow
@one_backbone
def test_watching_changes_nothing_in_a_run(tiny_policy: Path, folder: Path, tmp_path: Path) -> None:
    ends = []
    for kl_every in (0, 1):
        trainer, callback = watched(tiny_policy, folder, tmp_path, kl_every=kl_every)
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        callback.attach(trainer)
        trainer.train()
        ends.append([p.detach().numpy() for p in trainer.model.parameters() if p.requires_grad])
        moved = zip(before, ends[-1], strict=True)
        assert any(not np.array_equal(a.numpy(), b) for a, b in moved)
    assert callback.monitor.records[-1].kl > 0
    for unwatched, seen in zip(*ends, strict=True):
        np.testing.assert_array_equal(unwatched, seen)


@pytest.mark.slow
@one_backbone
def test_a_run_that_was_cut_goes_on_with_its_records(
    tiny_policy: Path, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "records.jsonl"
    options = {"kl_every": 1, "records": file, "save_strategy": "steps", "save_steps": 2}
    trainer, callback = watched(tiny_policy, folder, tmp_path, **options)
    callback.attach(trainer)
    trainer.train()
    whole = [record.to_json() for record in callback.monitor.records]
    trainer, callback = watched(tiny_policy, folder, tmp_path, **options)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    # Of the file's three steps the last is taken anew; it is measured from the run's beginning.
    found = [record.to_json() for record in callback.monitor.records]
    assert found == whole and len(whole) == 3 and whole[-1]["kl"] > 0


def test_the_kl_is_that_of_the_tokens_that_were_sampled(minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    from ensemble_rm.rl.trl_kl import encode_sampled

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
    )
    asked = (Message("user", "why is it so"),)
    turns = [{"role": "user", "content": "why is it so"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    drawn = tokenizer("because it", add_special_tokens=False)["input_ids"]
    samples = [Sample(asked, "because it"), Sample("why", "so"), Sample(asked, "because it")]
    chat, plain, text = encode_sampled(tokenizer, samples, [drawn, drawn[:1], None])
    assert (chat.ids, chat.start) == ([*prompt, *drawn], len(prompt))
    before = tokenizer("why")["input_ids"]
    assert (plain.ids, plain.start) == ([*before, *drawn[:1]], len(before))
    # Of text alone the template ends the turn, which a completion that was cut did not.
    assert text.ids == [*chat.ids, tokenizer.sep_token_id] and text.start == chat.start


def test_tokens_of_several_messages_are_not_the_scored_ones(
    two_heads: Callable[..., HeadScorer],
) -> None:
    reward = trl_reward(RewardEnsemble((two_heads(),), Normaliser.identity(2), mean()))
    seen: list[Any] = []
    reward.watched_by(lambda _samples, _rewards, tokens: seen.append(tokens))
    user, said = {"role": "user", "content": "p"}, {"role": "assistant", "content": "so"}
    tool = {"role": "tool", "content": "4"}
    reward([[user]] * 2, [[said], [said, tool, said]], [[5, 6], [5, 6, 7, 8]])
    reward(["p"], ["so"], [[5]])
    reward(["p"], ["so"])
    assert seen == [[[5, 6], None], [[5]], [None]]
