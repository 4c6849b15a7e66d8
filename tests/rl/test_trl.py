"""The reward function against TRL's own code: its contract, its logs, its trainers."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble, Sample
from ensemble_rm.aggregation import lcb, mean, minimum
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.members import HeadScorer
from ensemble_rm.rl import PinnedEnsemble, trl_reward
from ensemble_rm.rl.trl import AsyncTRLReward, TRLReward, version_number
from tests.support.trl_runs import tiny_run

NAN = float("nan")


def members() -> tuple[FunctionScorer, ...]:
    def words(sample: Sample) -> float:
        return NAN if "bad" in sample.completion else float(len(sample.completion.split()))

    return FunctionScorer("words", words), FunctionScorer("a", lambda s: s.completion.count("a"))


@pytest.fixture
def ensemble() -> RewardEnsemble:
    return RewardEnsemble(members(), Normaliser.identity(2), mean(), provenance={"version": "v3"})


@pytest.fixture
def calibrated(ensemble: RewardEnsemble) -> RewardEnsemble:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        n, m = rng.integers(1, 9, 2)
        first, second = " ".join("x" * n), " ".join("x" * m)
        won = rng.random() < 1 / (1 + math.exp(-(n - m) / 4))
        rows.append(Preference(f"p{i}", *((first, second) if won else (second, first))))
    return ensemble.calibrate(Preferences(tuple(rows)))


class Logs:
    """What TRL hands to a reward function for its logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extra: dict[str, list[Any]] = defaultdict(list)

    def call(self, reward: TRLReward, prompts: Any, completions: Any, **columns: Any) -> Any:
        found = reward(
            prompts=prompts,
            completions=completions,
            completion_ids=[[1]] * len(prompts),
            trainer_state=None,
            log_metric=lambda name, value: self.metrics[name].append(value),
            log_extra=lambda name, values: self.extra[name].extend(values),
            **columns,
        )
        return asyncio.run(found) if asyncio.iscoroutine(found) else found


def test_trl_reads_its_name_and_whether_to_await_it(ensemble: RewardEnsemble) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    reward = trl_reward(ensemble)
    awaited = trl_reward(ensemble, asynchronous=True, name="ours")
    assert (utils.get_callable_name(reward), utils.get_callable_name(awaited)) == (
        "ensemble",
        "ours",
    )
    assert not utils.is_async_callable(reward) and utils.is_async_callable(awaited)
    assert utils.is_async_callable(partial(awaited)) and isinstance(awaited, AsyncTRLReward)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_plain_and_conversational_data_score_alike(
    ensemble: RewardEnsemble, asynchronous: bool
) -> None:
    reward = trl_reward(ensemble.with_aggregator(minimum()), asynchronous=asynchronous)
    texts = ["a a b", "b", "aa"]
    plain = Logs().call(reward, ["p"] * 3, texts)
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    chat = Logs().call(reward, [[{"role": "user", "content": "p"}]] * 3, turns, answer=[1, 2, 3])
    assert plain == chat == [2.0, 0.0, 1.0]
    assert all(type(value) is float for value in plain)


def test_failed_samples_are_none_and_said(ensemble: RewardEnsemble) -> None:
    logs = Logs()
    found = logs.call(trl_reward(ensemble), ["p"] * 4, ["a", "bad", "a a", [3]])
    assert found == [1.0, None, 2.0, None]
    assert logs.metrics["ensemble/failed"] == [0.5]
    failures = logs.extra["ensemble/failure"]
    assert (
        failures[0] is None and "NonFiniteScoreError" in failures[1] and "DataError" in failures[3]
    )
    assert logs.extra["ensemble/member_std"][1] is None
    with pytest.raises(NonFiniteScoreError):
        Logs().call(trl_reward(ensemble, on_failure="raise"), ["p"] * 2, ["a", "bad"])


def test_metrics_are_what_they_say(calibrated: RewardEnsemble) -> None:
    logs = Logs()
    reward = trl_reward(calibrated)
    texts = ["a x", "x x x", " ".join("x" * 20), "a a a"]
    references = ["x x", "x x", None, "x x"]
    found = logs.call(reward, ["p", "p", "q", "q"], texts, reference=references)
    scores = calibrated.score([Sample("p", text) for text in texts])
    assert found == scores.reward.tolist()
    metrics = {name: value for name, (value,) in logs.metrics.items()}
    assert metrics["ensemble/member_std"] == pytest.approx(scores.std.mean())
    assert metrics["ensemble/version"] == version_number("v3")
    assert metrics["ensemble/disagreement"] == 0.5  # both pairs split the two members
    assert metrics["ensemble/member_correlation"] < 0
    # The judgments hold 1 to 8 words and no "a": 20 words and three "a"s lie outside.
    assert metrics["ensemble/outside_range/words"] == 0.25
    assert metrics["ensemble/outside_range/a"] == 0.5
    verdict = calibrated.compare(["p", "p", "q"], [texts[i] for i in (0, 1, 3)], ["x x"] * 3)
    assert metrics["ensemble/beats_reference"] == pytest.approx(verdict.probability.mean())
    beats = logs.extra["ensemble/beats_reference"]
    assert beats[2] is None and beats[0] == pytest.approx(verdict.probability[0])
    assert logs.extra["ensemble/version"] == ["v3"] * 4
    assert logs.extra["ensemble/score/words"] == [2, 3, 20, 3]
    assert logs.extra["ensemble/outside_range"] == [1, 0, 1, 1]
    assert all(len(column) == 4 for column in logs.extra.values())


def test_no_probability_under_another_aggregator(calibrated: RewardEnsemble) -> None:
    logs = Logs()
    reward = trl_reward(calibrated.with_aggregator(lcb(kappa=1.0)))
    logs.call(reward, ["p"], ["x"], reference=["x x"])
    assert "ensemble/beats_reference" not in logs.metrics | logs.extra


def test_one_member_has_no_spread() -> None:
    logs = Logs()
    alone = RewardEnsemble(members()[1:], Normaliser.identity(1), mean())
    assert logs.call(trl_reward(alone), ["p", "p"], ["a", "b"]) == [1.0, 0.0]
    assert set(logs.metrics) == {"ensemble/failed", "ensemble/version"}


def test_a_bad_name_is_named(ensemble: RewardEnsemble) -> None:
    with pytest.raises(OptionError, match="must be one word"):
        trl_reward(ensemble, name="two words")


def test_a_folder_is_pinned_first(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"PinnedEnsemble\("):
        trl_reward(folder)  # type: ignore[arg-type]


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def test_it_crosses_to_another_process_and_groups_split_alike(folder: Path) -> None:
    reward = trl_reward(PinnedEnsemble(folder, device="cpu"), name="hh")
    assert reward.pinned._ensemble is None
    other = pickle.loads(pickle.dumps(reward))
    assert other.__name__ == "hh"
    prompts = ["What is it?"] * 4 + ["Say hello to all of them."] * 4
    texts = ["yes", "no way", "a longer answer than that", "it is", "hello", "hi all", "no", "hm"]
    whole = Logs().call(reward, prompts, texts)
    ranks = [Logs().call(other, prompts[i::3], texts[i::3]) for i in range(3)]
    for i, part in enumerate(ranks):
        np.testing.assert_allclose(part, whole[i::3], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "asynchronous"), [("GRPO", False), ("GRPO", True), ("RLOO", False)]
)
def test_a_trainer_learns_from_it_and_logs_it(
    tiny_policy: Path, folder: Path, tmp_path: Path, kind: str, asynchronous: bool
) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset

    reward = trl_reward(PinnedEnsemble(folder, device="cpu"), asynchronous=asynchronous)
    seen: list[list[float | None]] = []
    reward.watched_by(lambda _, rewards, __: seen.append(rewards.listed()))
    data = Dataset.from_dict(
        {"prompt": ["Say hello", "Say no", "Why"] * 2, "reference": ["hi"] * 6}
    )
    trainer = tiny_run(tiny_policy, reward, tmp_path, data, kind=kind)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    assert len(history) == 3 == len(seen)
    for row, rewards in zip(history, seen, strict=True):
        assert row["rewards/ensemble/mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
        assert row["ensemble/version"] == version_number(reward.pinned.version)
        assert row["ensemble/failed"] == 0 and row["ensemble/member_std"] >= 0
        assert {"ensemble/disagreement", "ensemble/member_correlation"} <= set(row)
    assert any(
        not np.array_equal(before[n].numpy(), p.detach().numpy())
        for n, p in trainer.model.named_parameters()
    )


@pytest.mark.slow
def test_trls_own_calculation_of_rewards(tiny_policy: Path, tmp_path: Path, ensemble: Any) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["p"]})
    trainer = tiny_run(tiny_policy, trl_reward(ensemble), tmp_path, data)
    user, said = {"role": "user", "content": "p"}, ["a a", "bad", "x"]
    turns = [[{"role": "assistant", "content": text}] for text in said]
    for prompt, completions in (("p", said), ([user], turns)):
        inputs = [{"prompt": prompt, "reference": None}] * 3
        found = trainer._calculate_rewards(inputs, [prompt] * 3, completions, [[1]] * 3)
        np.testing.assert_array_equal(found[:, 0].numpy(), [2.0, NAN, 0.5])
    assert trainer._pending_metrics["ensemble/failed"] == [pytest.approx(1 / 3)] * 2
    assert len(trainer._pending_extra_logs["ensemble/failure"]) == 6
