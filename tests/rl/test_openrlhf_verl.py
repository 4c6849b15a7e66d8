"""OpenRLHF and veRL: their reward functions in the shapes in which the released packages call them.

Neither installs beside this package's versions of transformers. The calls below are those of
openrlhf 0.11.0 (`utils/agent.py`, `SingleTurnAgentExecutor`, and what
`trainer/ppo_utils/samples_generator.py` makes of the answer) and of verl 0.9.0
(`trainer/ppo/reward.py`, `experimental/reward_loop/reward_manager/naive.py`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, Message, RewardEnsemble, Sample
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.errors import (
    DataError,
    NonFiniteScoreError,
    OptionError,
    PinnedVersionError,
    RawTextError,
)
from ensemble_rm.members import HeadScorer
from ensemble_rm.rl import openrlhf_reward, verl_reward
from ensemble_rm.rl.batching import ThreadBatcher
from ensemble_rm.rl.chat import read_query
from ensemble_rm.rl.pinned import PinnedEnsemble

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
STOP = ["<|im_end|>", "<|endoftext|>"]
MESSAGES = [{"role": "user", "content": "Hi"}]


def length(sample: Sample) -> float:
    return float("nan") if "bad" in sample.completion else float(len(sample.completion))


@pytest.fixture
def ensemble() -> RewardEnsemble:
    turns = FunctionScorer("turns", lambda s: 10.0 * isinstance(s.prompt, tuple))
    scorers = (FunctionScorer("length", length), turns)
    return RewardEnsemble(scorers, Normaliser.identity(2), mean())


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def as_openrlhf_calls(reward_func: Any, query: str, prompt: str, label: object) -> dict[str, Any]:
    """One sample, in a thread; the answer becomes tensors, each of [value]."""
    import torch

    said = asyncio.run(_in_a_thread(reward_func, query, prompt, label))
    score = said.get("scores")
    score = said.get("rewards") if score is None else score
    info = {"reward": torch.tensor([said.get("rewards")]), "score": torch.tensor([score])}
    return info | {key: torch.tensor([value]) for key, value in said["extra_logs"].items()}


async def _in_a_thread(reward_func: Any, *values: object) -> Any:
    (found,) = await asyncio.gather(asyncio.to_thread(reward_func, *[[v] for v in values]))
    return found


def test_openrlhf_gets_one_number_a_sample(ensemble: RewardEnsemble) -> None:
    reward_func = openrlhf_reward(ensemble, stop=STOP)
    label = json.dumps(MESSAGES)
    info = as_openrlhf_calls(reward_func, f"{CHAT}Hello<|im_end|>", CHAT, label)
    assert {name: tuple(value.shape) for name, value in info.items()} == dict.fromkeys(
        ("reward", "score", "member_mean", "member_std"), (1,)
    )
    assert info["reward"].item() == info["score"].item() == (5 + 10) / 2
    # Its server's clients send several at once and read lists.
    several = reward_func([f"{CHAT}Hello", f"{CHAT}Yes"], [CHAT] * 2, [label] * 2)
    assert several["rewards"] == several["scores"] == [7.5, 6.5]
    assert [len(values) for values in several["extra_logs"].values()] == [2, 2]


@pytest.mark.parametrize("tail", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|>"])
def test_only_the_completion_is_read(tail: str) -> None:
    label = json.dumps({"prompt": MESSAGES, "reference": "Hey"})
    sample = read_query(f"{CHAT}Hello{tail}", CHAT, label, stop=STOP, refusing=["any"])
    assert sample == Sample((Message("user", "Hi"),), "Hello", "Hey")


@pytest.mark.parametrize("label", ["", "42", "null", "[]", None, '{"answer": 42}', "no JSON"])
def test_without_messages_members_refuse_by_name(label: object, ensemble: RewardEnsemble) -> None:
    query = f"{CHAT}Hello<|im_end|>"
    some = openrlhf_reward(ensemble, stop=STOP, raw_text_members=["length"])
    with pytest.raises(RawTextError, match="members turns cannot"):
        some([query], [CHAT], [label])
    every = openrlhf_reward(ensemble, stop=STOP, raw_text_members=["length", "turns"])
    assert every([query], [CHAT], [label])["rewards"] == 2.5
    with pytest.raises(OptionError, match="no member 'size'"):
        openrlhf_reward(ensemble, stop=STOP, raw_text_members=["size"])([query], [CHAT], [label])


def test_openrlhf_failures_keep_their_names(ensemble: RewardEnsemble) -> None:
    reward_func = openrlhf_reward(ensemble, stop=STOP)
    label = json.dumps(MESSAGES)
    with pytest.raises(NonFiniteScoreError):
        reward_func([f"{CHAT}bad"], [CHAT], [label])
    with pytest.raises(DataError, match="must begin with its prompt"):
        reward_func([CHAT[9:] + "Hello"], [CHAT], [label])
    with pytest.raises(DataError, match="reference must be text"):
        reward_func([f"{CHAT}a"], [CHAT], [json.dumps({"prompt": "p", "reference": 3})])
    with pytest.raises(OptionError, match="2 queries"):
        reward_func([CHAT] * 2, [CHAT], [label])


def as_verl_calls(compute_score: Any, response: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """By keywords, in an executor, through a partial; every key is kept."""
    extra_info = extra_info | {"num_turns": None, "rollout_reward_scores": {}}

    async def run() -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: partial(compute_score)(
                data_source="hh", solution_str=response, ground_truth="", extra_info=extra_info
            ),
        )

    result = asyncio.run(run())
    return {"reward_score": result["score"], "reward_extra_info": dict(result)}


def test_verl_gets_the_same_keys_for_every_sample(ensemble: RewardEnsemble) -> None:
    compute_score = verl_reward(ensemble)
    asked = [{"prompt": "Hi"}, {"prompt": MESSAGES}, {"prompt": np.array(MESSAGES, dtype=object)}]
    outputs = [as_verl_calls(compute_score, "Hello", info) for info in asked]
    assert [out["reward_score"] for out in outputs] == [2.5, 7.5, 7.5]
    infos = [out["reward_extra_info"] for out in outputs]
    columns = {key: np.array([info[key] for info in infos]) for key in infos[0]}
    assert all(column.dtype == np.float64 for column in columns.values())
    alone = RewardEnsemble(ensemble.scorers[:1], Normaliser.identity(1), mean())
    one = as_verl_calls(verl_reward(alone), "Hello", {"prompt": "Hi"})["reward_extra_info"]
    assert list(one) == list(infos[0]) and np.isnan(one["member_std"])


def test_verl_failures_keep_their_names(ensemble: RewardEnsemble) -> None:
    compute_score = verl_reward(ensemble)
    with pytest.raises(DataError, match=r"extra_info\['prompt'\]"):
        as_verl_calls(compute_score, "Hello", {})
    with pytest.raises(NonFiniteScoreError):
        as_verl_calls(compute_score, "bad", {"prompt": "Hi"})
    with pytest.raises(DataError, match="reference"):
        compute_score("hh", "Hello", "", {"prompt": "Hi", "reference": 1})


def test_calls_that_come_together_are_scored_together() -> None:
    """The first is held until all others wait: they make one batch, and each gets its own."""
    sizes: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    class Slow:
        names = ("slow",)

        def score(self, samples: Any) -> np.ndarray:
            sizes.append(len(samples))
            began.set()
            assert go_on.wait(300)
            return np.array([[float(len(s.completion))] for s in samples])

    batcher = ThreadBatcher(
        PinnedEnsemble(RewardEnsemble((Slow(),), Normaliser.identity(1), mean()))
    )
    found: dict[int, list[float | None]] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: found.update({i: batcher([Sample("p", "x" * i)]).listed()})
        )
        for i in range(1, 9)
    ]
    threads[0].start()
    assert began.wait(300)
    for thread in threads[1:]:
        thread.start()
    while len(batcher._waiting) < 7:
        threading.Event().wait(0.01)
    go_on.set()
    for thread in threads:
        thread.join(300)
    assert sizes == [1, 7]
    assert found == {i: [float(i)] for i in range(1, 9)}


def test_a_broken_member_reaches_every_caller() -> None:
    def broken(sample: Sample) -> float:
        raise KeyError("a bug")

    scorer = FunctionScorer("broken", broken)
    batcher = ThreadBatcher(
        PinnedEnsemble(RewardEnsemble((scorer,), Normaliser.identity(1), mean()))
    )
    for _ in range(2):
        with pytest.raises(KeyError):
            batcher([Sample("p", "a")])


def load(path: Path) -> Any:
    """Run a reward file as both loops do: from its path."""
    spec = importlib.util.spec_from_file_location("custom_module", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_init_reward_writes_files_that_the_loops_can_use(folder: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--aggregator", "lcb", "--kappa", "0.5", "--nan", "omit"]
    for loop in ("trl", "openrlhf", "verl"):
        out = tmp_path / "rewards" / f"{loop}_reward.py"
        assert main(["init-reward", loop, str(folder), *options, "--out", str(out)]) == 0
        compile(out.read_text(), out.name, "exec")
        assert "nan='omit'" in out.read_text()
    ensemble = RewardEnsemble.from_pretrained(folder, device="cpu").with_aggregator(lcb(kappa=0.5))
    sample = Sample((Message("user", "Hi"),), "Hello")
    wanted = pytest.approx(float(ensemble.score([sample]).reward[0]), abs=1e-6)
    rewards = tmp_path / "rewards"
    trl = load(rewards / "trl_reward.py").reward
    assert trl([MESSAGES], [[{"role": "assistant", "content": "Hello"}]]) == [wanted]
    openrlhf = load(rewards / "openrlhf_reward.py").reward_func
    info = as_openrlhf_calls(openrlhf, f"{CHAT}Hello<|im_end|>", CHAT, json.dumps(MESSAGES))
    assert info["reward"].item() == wanted
    verl = load(rewards / "verl_reward.py").compute_score
    assert as_verl_calls(verl, "Hello", {"prompt": MESSAGES})["reward_score"] == wanted


def test_init_reward_pins_the_version(
    folder: Path, tmp_path: Path, two_heads: Callable[..., HeadScorer]
) -> None:
    out = tmp_path / "reward.py"
    assert main(["init-reward", "verl", str(folder), "--device", "cpu", "--out", str(out)]) == 0
    changed = RewardEnsemble((two_heads(seed=3),), Normaliser.identity(2), mean())
    changed.save_pretrained(folder)
    with pytest.raises(PinnedVersionError):
        load(out)


def test_init_reward_refuses_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reward.py"
    command = ["init-reward", "trl", str(folder), "--device", "cpu", "--out"]
    assert main([*command, str(out), "--dry-run"]) == 0
    assert not out.exists() and "trl_reward(" in capsys.readouterr().out
    assert main([*command, str(out), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"] is False and said["digest"] in said["text"]
    assert main([*command, str(tmp_path / "my-reward.txt")]) == 2
    out.write_text("mine")
    assert main([*command, str(out)]) == 2
    assert out.read_text() == "mine" and "exists" in capsys.readouterr().err
    command[2] = str(tmp_path / "nothing")
    assert main([*command, str(tmp_path / "other.py")]) == 4
