"""The monitor: what it records, when it warns, what it asks people; TRL's callback on a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.data.loading import read_comparisons
from ensemble_rm.errors import DataError, LoopError, OptionError
from ensemble_rm.members import HeadScorer
from ensemble_rm.rl import PinnedEnsemble, trl_reward
from ensemble_rm.rl.monitor.alarms import AlarmRule, StepRecord, gold_curve
from ensemble_rm.rl.monitor.monitor import OverOptimisationMonitor
from ensemble_rm.rl.monitor.plot import draw_run
from ensemble_rm.rl.scoring import score_each


def members(spread: float = 1.0) -> RewardEnsemble:
    """Both like length; the second dislikes "z" more, the more `spread`."""
    longer = FunctionScorer("long", lambda s: float(np.log(max(len(s.completion), 1))))
    other = FunctionScorer(
        "other",
        lambda s: (
            float("nan")
            if "bad" in s.completion
            else float(np.log(max(len(s.completion), 1)) - spread * s.completion.count("z"))
        ),
    )
    return RewardEnsemble((longer, other), Normaliser.identity(2), mean())


def step(monitor: OverOptimisationMonitor, ensemble: RewardEnsemble, at: int, *texts: str) -> Any:
    samples = [Sample("p", text) for text in texts]
    return monitor.observe(at, samples, score_each(ensemble, samples))


def record(at: int, **known: float) -> StepRecord:
    values: dict[str, Any] = {"reward": 0.0, "length_controlled": 0.0, "member_std": 1.0}
    values |= {"disagreement": 0.0, "log_length": 3.0, "length_slopes": {"reward": 0.5}}
    return StepRecord(at, **(values | known))


def test_a_step_is_recorded_as_it_was() -> None:
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    assert step(monitor, ensemble, 1, "xx", "xxxx", "zz", "bad") == []
    (kept,) = monitor.records
    scores = ensemble.score([Sample("p", text) for text in ("xx", "xxxx", "zz")])
    assert kept.reward == pytest.approx(scores.reward.mean())
    assert kept.member_std == pytest.approx(scores.std.mean())
    assert kept.log_length == pytest.approx(np.log([2, 4, 2]).mean())
    assert kept.failed == 0.25
    assert math.isnan(kept.kl) and kept.to_json()["kl"] is None
    assert set(kept.length_slopes) == {"reward", "mean", "minimum"}
    assert kept.length_slopes["minimum"] > kept.length_slopes["mean"]


def test_a_reward_of_length_alone_is_explained_by_length() -> None:
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    for at in range(1, 6):
        step(monitor, ensemble, at, "x" * 4 * at, "x" * 8 * at)
    first, last = monitor.records[0], monitor.records[-1]
    assert last.length_slopes["reward"] == pytest.approx(1.0)
    assert last.reward == pytest.approx(first.reward + math.log(5))
    assert last.length_controlled == pytest.approx(first.length_controlled)


def test_a_call_in_which_all_failed_is_no_step() -> None:
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    assert step(monitor, ensemble, 1, "bad") == [] and monitor.records == ()
    step(monitor, ensemble, 2, "fine")
    with pytest.raises(OptionError, match="greater than 2, not 2"):
        step(monitor, ensemble, 2, "fine")
    with pytest.raises(OptionError, match="'reward'"):
        OverOptimisationMonitor(ensemble, aggregators={"reward": mean()})


def test_the_calibrations_judgments_are_the_reference() -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(300):
        n, m = (int(x) for x in rng.integers(1, 30, 2))
        a, b = "x" * n + "z" * (i % 2), "x" * m
        won = rng.random() < n / (n + m)
        rows.append(Preference(f"p{i}", *((a, b) if won else (b, a))))
    ensemble = members().calibrate(Preferences(tuple(rows)))
    rule = AlarmRule(window=2, std_factor=2.0)
    monitor = OverOptimisationMonitor(ensemble, rule=rule)
    evidence = ensemble.calibration.evidence  # type: ignore[union-attr]
    judged = np.concatenate([evidence.first, evidence.second])  # type: ignore[union-attr]
    assert monitor.reference_std == pytest.approx(judged.std(axis=1, ddof=1).mean())
    assert step(monitor, ensemble, 1, "xz", "xx") == []
    assert step(monitor, ensemble, 2, "xxx", "xxxx") == []
    step(monitor, ensemble, 3, "xzzzz", "xzzzzz")
    (alarm,) = step(monitor, ensemble, 4, "xzzzz", "xzzzzz")
    assert alarm.kind == "disagreement" and "judgments" in alarm.message
    assert monitor.records[-1].outside_range == 0.5  # the second member's alone


@given(st.floats(0.5, 3.0), st.floats(0.2, 2.0))
def test_gold_warns_before_the_peak_and_not_long_before(alpha: float, beta: float) -> None:
    """Checks on a planted curve, at growing d: the first alarm stands at the rule's share."""
    rule, peak = AlarmRule(peak_share=0.9), math.exp(alpha / beta - 1)
    records, first = [record(0, kl=0.0, gold=2.0)], None
    grid = np.linspace(0.05, 1.5, 30) * peak
    for at, d in enumerate(grid, start=1):
        records.append(record(at, kl=d**2, gold=2.0 + d * (alpha - beta * math.log(d))))
        if first is None and rule.alarms(records, aggregator="reward", reference_std=9.0):
            first = d
    assert first is not None
    assert 0.9 * peak - 1e-6 <= first <= 0.9 * peak + (grid[1] - grid[0]) + 1e-6
    assert first < peak


def test_too_few_gold_checks_are_no_curve() -> None:
    records = [record(i, kl=float(i), gold=float(i)) for i in range(4)]
    assert gold_curve(records, min_gold=4) is None
    records.append(record(4, kl=4.0, gold=1.0))
    assert gold_curve(records, min_gold=4) is not None


def test_disagreement_is_held_against_the_beginning_where_nothing_was_judged() -> None:
    rule = AlarmRule(window=3, std_factor=1.5)
    calm = [record(i) for i in range(8)]
    assert rule.alarms(calm, aggregator="reward", reference_std=None) == []
    wild = calm + [record(i, member_std=2.0) for i in range(8, 11)]
    (alarm,) = rule.alarms(wild, aggregator="reward", reference_std=None)
    assert (alarm.kind, alarm.step) == ("disagreement", 10)
    assert rule.alarms(wild[:9], aggregator="reward", reference_std=None) == []


@pytest.mark.parametrize(
    ("slope", "grown", "warns"), [(0.5, 2.1, 1), (-0.5, 2.1, 0), (0.5, 1.9, 0)]
)
def test_length_warns_where_it_grows_and_pays(slope: float, grown: float, warns: int) -> None:
    rule = AlarmRule(window=2)
    later = {"log_length": 3.0 + math.log(grown), "length_slopes": {"reward": slope}}
    records = [record(0), record(1), record(2, **later), record(3, **later)]  # type: ignore[arg-type]
    found = rule.alarms(records, aggregator="reward", reference_std=9.0)
    assert [alarm.kind for alarm in found] == ["length"] * warns


def test_kl_has_a_bound_where_one_is_given() -> None:
    records = [record(0, kl=3.0), record(1)]
    assert AlarmRule().alarms(records, aggregator="reward", reference_std=9.0) == []
    (alarm,) = AlarmRule(max_kl=2.0).alarms(records, aggregator="reward", reference_std=9.0)
    assert (alarm.kind, alarm.step) == ("kl", 1)


@pytest.mark.parametrize(
    "values",
    [
        {"peak_share": 0.0},
        {"peak_share": 1.1},
        {"min_gold": 2},
        {"std_factor": 1.0},
        {"length_factor": 1.0},
        {"max_kl": 0.0},
        {"window": 0},
    ],
)
def test_impossible_rules_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values))):
        AlarmRule(**values)


def test_gold_checks_need_a_step_and_a_kl() -> None:
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    with pytest.raises(OptionError, match="needs a recorded step"):
        monitor.check_gold(1.0)
    step(monitor, ensemble, 1, "x", "xx")
    with pytest.raises(OptionError, match="has no KL"):
        monitor.check_gold(1.0)
    monitor.check_gold(1.0, kl=0.5)
    assert (monitor.records[-1].gold, monitor.records[-1].kl) == (1.0, 0.5)


def test_the_most_disputed_pair_goes_to_people(tmp_path: Path) -> None:
    ensemble, pool = members(), tmp_path / "pool" / "pairs.jsonl"
    monitor = OverOptimisationMonitor(ensemble, pool=pool)
    step(monitor, ensemble, 1, "x", "xzzz", "xz")
    step(monitor, ensemble, 2, "alone")
    step(monitor, ensemble, 3, "xx", "xzz")
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    assert [(row["step"], row["first"], row["second"]) for row in rows] == [
        (1, "x", "xzzz"),
        (3, "xx", "xzz"),
    ]
    first = read_comparisons(pool)[0]
    assert (first.prompt, first.chosen, first.rejected) == ("p", "x", "xzzz")


def test_records_and_their_picture(tmp_path: Path) -> None:
    records = [record(i, kl=float(i), gold=1.0 if i % 2 else math.nan) for i in range(6)]
    rule = AlarmRule(max_kl=2.0)
    alarms = rule.alarms(records, aggregator="reward", reference_std=None)
    path = draw_run(records, tmp_path / "run.png", alarms=alarms, reference_std=1.0)
    assert path.read_bytes().startswith(b"\x89PNG")
    draw_run(records[:1], tmp_path / "one.png")
    with pytest.raises(DataError):
        draw_run([], tmp_path / "none.png")
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    step(monitor, ensemble, 1, "x", "xx")
    lines = monitor.save(tmp_path / "deep" / "records.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1


TEXTS = [("x", "xx"), ("xxz", "xxxx"), ("xxxxx", "x"), ("xxxxxxx", "xxzz")]


def test_a_monitor_goes_on_where_its_run_was_cut(tmp_path: Path) -> None:
    ensemble = members()
    whole = OverOptimisationMonitor(ensemble)
    for i, texts in enumerate(TEXTS, 1):
        step(whole, ensemble, i, *texts)
        if i == 3:
            whole.check_gold(0.5, kl=1.0)
            file = whole.save(tmp_path / "records.jsonl")  # one step more than the checkpoint
    later = OverOptimisationMonitor(ensemble)
    later.restore(file, until=2)
    for i, texts in enumerate(TEXTS[2:], 3):
        step(later, ensemble, i, *texts)
        if i == 3:
            later.check_gold(0.5, kl=1.0)
    assert [r.to_json() for r in later.records] == [r.to_json() for r in whole.records]
    with pytest.raises(OptionError, match="already recorded step 4"):
        later.restore(file, until=2)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 2, "length_slopes": 3}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    ensemble = members()
    monitor = OverOptimisationMonitor(ensemble)
    step(monitor, ensemble, 1, *TEXTS[0])
    file = monitor.save(tmp_path / "records.jsonl")
    file.write_text(file.read_text() + line + "\n")
    fresh = OverOptimisationMonitor(ensemble)
    with pytest.raises(DataError, match="line 2"):
        fresh.restore(file, until=2)
    assert fresh.records == ()


@pytest.fixture
def folder(two_heads: Callable[..., HeadScorer], tmp_path: Path) -> Path:
    ensemble = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    return ensemble.save_pretrained(tmp_path / "saved")


def watched(folder: Path, monitor_options: dict[str, Any], **options: Any) -> Any:
    from ensemble_rm.rl.monitor.trl_callback import MonitorCallback

    reward = trl_reward(PinnedEnsemble(folder, device="cpu"))
    monitor = OverOptimisationMonitor(reward.pinned.ensemble, **monitor_options)
    return reward, MonitorCallback(reward, monitor, **options)


def run(policy: Path, reward: Any, tmp_path: Path, **options: Any) -> Any:
    from datasets import Dataset

    from tests.support.trl_runs import tiny_run

    data = Dataset.from_dict({"prompt": ["Say hello", "Say no", "Why"] * 2})
    return tiny_run(policy, reward, tmp_path, data, **options)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_callback_measures_what_trl_does_not(
    tiny_policy: Path, folder: Path, tmp_path: Path, beta: float
) -> None:
    pytest.importorskip("trl")
    reward, callback = watched(folder, {}, kl_every=1, records=tmp_path / "records.jsonl")
    trainer = run(tiny_policy, reward, tmp_path, beta=beta, learning_rate=0.05)
    callback.attach(trainer)
    trainer.train()
    records = callback.monitor.records
    assert [r.step for r in records] == [1, 2, 3]
    # The policy that samples first has not moved; a large rate then moves it visibly.
    assert records[0].kl == pytest.approx(0, abs=1e-9)
    assert all(r.kl > 0 for r in records[1:]) and records[-1].kl > 1e-3
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert [r.reward for r in records] == pytest.approx(
        [row["rewards/ensemble/mean"] for row in logged], abs=1e-5
    )
    if beta > 0:  # TRL's own, of a token, on the same tokens
        theirs = [row["kl"] * row["completions/mean_length"] for row in logged]
        assert [r.kl for r in records] == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 3
    assert trainer.model.training
    if beta == 0:
        assert all(not p.requires_grad for p in callback.reference.parameters())
    else:
        assert callback.reference is trainer.ref_model
    # The first policy strays from itself by nothing.
    trainer.model.load_state_dict(callback.reference.state_dict())
    assert callback.measure_kl([Sample("Say hello", "hello to you")]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_lora_policy_is_its_own_reference(
    tiny_policy: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    from peft import LoraConfig

    reward, callback = watched(folder, {}, kl_every=1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = run(tiny_policy, reward, tmp_path, lora=lora, learning_rate=0.5)
    callback.attach(trainer)
    before = callback.measure_kl([Sample("Say hello", "hello to you")])
    assert before == pytest.approx(0, abs=1e-9)  # an adapter begins with no effect
    trainer.train()
    assert callback.reference is None
    assert callback.monitor.records[-1].kl > 1e-6


@pytest.mark.slow
def test_the_callback_stops_and_raises(tiny_policy: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    always = {"rule": AlarmRule(max_kl=1e-9, window=1)}
    options = {"kl_every": 1, "action": "stop"}
    reward, callback = watched(folder, always, **options)
    trainer = run(tiny_policy, reward, tmp_path, learning_rate=0.05)
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 2  # the first step's policy has not moved yet
    assert [alarm.kind for alarm in callback.alarms] == ["kl"]

    reward, callback = watched(folder, always, kl_every=1, action="raise_beta", beta_factor=3.0)
    trainer = run(tiny_policy, reward, tmp_path, beta=0.01, learning_rate=0.05)
    callback.attach(trainer)
    trainer.train()
    # Raised at the second step, and again after each window of one step.
    assert trainer.beta == pytest.approx(0.01 * 9)

    reward, callback = watched(folder, {}, action="raise_beta")
    with pytest.raises(LoopError, match="needs a run with beta > 0"):
        callback.attach(run(tiny_policy, reward, tmp_path))


def test_impossible_callbacks_are_named(folder: Path) -> None:
    for options in ({"action": "shout"}, {"beta_factor": 1.0}, {"kl_every": -1}, {"kl_samples": 0}):
        with pytest.raises(OptionError):
            watched(folder, {}, **options)
