"""The monitor as a callback of TRL's trainers: it warns, stops, or raises β.

Without a penalty TRL holds no reference model and logs no KL: the callback then measures it itself,
on a sample of each few steps' completions, against the policy that the run began with.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import LoopError, OptionError
from ensemble_rm.rl.monitor.alarms import Alarm, mean_of
from ensemble_rm.rl.monitor.monitor import OverOptimisationMonitor
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.rl.trl import TRLReward
from ensemble_rm.rl.trl_kl import encode_sampled, mean_kl

Action: TypeAlias = Literal["warn", "stop", "raise_beta"]
_ACTIONS = ("warn", "stop", "raise_beta")
_Call: TypeAlias = "tuple[list[Sample | Exception], LoopRewards, list[list[int] | None]]"
PREFIX = "monitor/"

log = logging.getLogger(__name__)


class MonitorCallback(TrainerCallback):
    """Watches a run of GRPOTrainer or RLOOTrainer; `attach` it before `train`.

    Parameters
    ----------
    reward : TRLReward
        The run's reward function, made by `trl_reward`.
    monitor : OverOptimisationMonitor
        Whose rule decides.
    action : {"warn", "stop", "raise_beta"}
        What an alarm does when it is raised: a warning in the log of this module; the same and the
        end of training after the step; the same and β times `beta_factor`, again after each
        `window` of the rule while it lasts.
    beta_factor : float
        > 1.
    kl_every : int
        Steps from one measurement of the KL to the next; 0 measures none. It is what the monitor
        costs: of 8 completions a step, by default well below a hundredth of the run.
    kl_samples : int
        Completions that it is measured on.
    reference : torch.nn.Module, optional
        The policy that the run began with. Where not given: TRL's own reference model; else, for a
        LoRA policy, itself without the adapter; else a copy of the policy made when training
        begins, which takes its memory once more.
    records : str or Path, optional
        A JSONL file that holds the records after each step.
    """

    def __init__(
        self,
        reward: TRLReward,
        monitor: OverOptimisationMonitor,
        *,
        action: Action = "warn",
        beta_factor: float = 2.0,
        kl_every: int = 20,
        kl_samples: int = 4,
        reference: torch.nn.Module | None = None,
        records: str | Path | None = None,
    ) -> None:
        if action not in _ACTIONS:
            raise OptionError(f"action must be one of {_ACTIONS}, not {action!r}")
        if not beta_factor > 1:
            raise OptionError(f"beta_factor must be > 1, not {beta_factor!r}")
        if kl_every < 0 or kl_samples < 1:
            raise OptionError(f"kl_every={kl_every!r} and kl_samples={kl_samples!r}")
        self.reward, self.monitor, self.action = reward, monitor, action
        self.beta_factor, self.kl_every, self.kl_samples = beta_factor, kl_every, kl_samples
        self.reference, self.records = reference, records
        self.alarms: list[Alarm] = []
        self._trainer: Any = None
        self._calls: list[_Call] = []
        self._kl: float | None = None  # of the step that is being taken
        self._active: dict[str, int] = {}  # alarm -> step of its last action
        self._figures: list[dict[str, float]] = []  # of the steps since the last log
        self._logged = 0  # the last log's step

    def attach(self, trainer: Any) -> MonitorCallback:
        """Watch a trainer.

        Parameters
        ----------
        trainer : GRPOTrainer or RLOOTrainer

        Returns
        -------
        MonitorCallback
            This one.

        Raises
        ------
        LoopError
            If β is to be raised in a run that has none, or whose loss has taken it already.
        """
        if self.action == "raise_beta":
            if not trainer.beta > 0:
                raise LoopError(
                    f"β can be raised only in a run that was started with β > 0, and this one has "
                    f"{trainer.beta}: without, TRL holds no reference model; set beta in its config"
                )
            if getattr(trainer.args, "use_liger_kernel", False):
                raise LoopError("use_liger_kernel fixes β at the start; switch it off")
        self._trainer = trainer
        self.reward.watched_by(self._collect)
        # Before those that report: what it adds to the logs is seen by the callbacks after it.
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def _collect(
        self,
        samples: list[Sample | Exception],
        rewards: LoopRewards,
        tokens: list[list[int] | None],
    ) -> None:
        if self._trainer.model.training:  # an evaluation is not the run
            self._calls.append((samples, rewards, tokens))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Keep the policy that the run begins with; one that was cut goes on with its records."""
        if state.global_step > 0 and self.records is not None and Path(self.records).is_file():
            self.monitor.restore(self.records, until=state.global_step)
        model = self._policy()
        if self.kl_every == 0 or self.reference is not None or hasattr(model, "disable_adapter"):
            return
        self.reference = self._trainer.ref_model
        if self.reference is not None:
            return
        if state.global_step > 0:
            raise OptionError(
                f"a run that goes on at step {state.global_step} no longer holds the policy that "
                "it began with; give it as reference, or kl_every=0"
            )
        reference = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        # TRL and accelerate put closures over the policy there: a copy's would run the policy.
        vars(reference).pop("forward", None)
        self.reference = reference

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Measure the KL while the policy is the one that has sampled."""
        step = state.global_step + 1
        due = self.kl_every > 0 and (step % self.kl_every == 0 or not self.monitor.records)
        if due and self._calls:
            samples = [sample for part, _rewards, _tokens in self._calls for sample in part]
            tokens = [ids for _samples, _rewards, part in self._calls for ids in part]
            self._kl = self.measure_kl(samples, tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """Take in the step's reward calls, and act."""
        calls, self._calls = self._calls, []
        kl, self._kl = self._kl, None
        alarms: list[Alarm] = []
        figures: dict[str, float] = {}
        if calls:
            samples = [sample for part, _rewards, _tokens in calls for sample in part]
            rewards = LoopRewards.join([rewards for _samples, rewards, _tokens in calls])
            alarms = self.monitor.observe(state.global_step, samples, rewards, kl=kl)
            figures = self._of_step(state.global_step, alarms)
            if self.records is not None:
                self.monitor.save(self.records)
        # Every rank acts as one: a rank that stopped alone would leave the others waiting.
        ranks = gather_object([(alarms, figures)])
        self._figures.append(averaged([figures for _alarms, figures in ranks]))
        self._act([a for alarms, _figures in ranks for a in alarms], state.global_step, control)
        return control

    def _of_step(self, step: int, alarms: list[Alarm]) -> dict[str, float]:
        """Return what the reward's own metrics do not hold; nothing where all samples failed."""
        records = self.monitor.records
        if not records or records[-1].step != step:
            return {}
        last = records[-1]
        slopes = {f"length_slope/{name}": slope for name, slope in last.length_slopes.items()}
        return slopes | {
            "length_controlled": last.length_controlled,
            "log_length": last.log_length,
            "outside_range": last.outside_range,
            "missing": last.missing,
            "kl": last.kl,
            "alarms": float(len({alarm.kind for alarm in alarms})),
        }

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Add the figures to the trainer's logs, as means over the steps since the last one."""
        logs = given["logs"]
        if "loss" not in logs:  # an evaluation, or the run's summary
            return
        figures, self._figures = averaged(self._figures), []
        fresh = [r.gold for r in self.monitor.records if r.step > self._logged]
        figures["gold"] = mean_of(fresh)
        if self.action == "raise_beta":
            figures["beta"] = float(self._trainer.beta)
        self._logged = state.global_step
        named = {PREFIX + name: value for name, value in figures.items() if math.isfinite(value)}
        logs.update(named)
        state.log_history[-1].update(named)

    def _act(self, alarms: list[Alarm], step: int, control: Any) -> None:
        kinds = {alarm.kind for alarm in alarms}
        self._active = {kind: at for kind, at in self._active.items() if kind in kinds}
        raised = {}
        for alarm in alarms:
            if alarm.kind not in self._active:
                raised[alarm.kind] = alarm
        lasting = [at for at in self._active.values() if step - at >= self.monitor.rule.window]
        for kind, alarm in raised.items():
            self._active[kind] = step
            self.alarms.append(alarm)
            log.warning("step %d, %s: %s", alarm.step, kind, alarm.message)
        if raised and self.action == "stop":
            control.should_training_stop = True
        if self.action == "raise_beta" and (raised or lasting):
            self._trainer.beta *= self.beta_factor
            self._active = dict.fromkeys(self._active, step)
            log.warning("step %d: β is %g from now on", step, self._trainer.beta)

    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def measure_kl(
        self,
        samples: Sequence[Sample | Exception],
        tokens: Sequence[list[int] | None] | None = None,
    ) -> float | None:
        """Estimate KL(policy ‖ the run's first policy), nats a completion, on some samples.

        By the estimator k3, on the tokens that the policy has sampled; None where no sample can be
        read.

        Parameters
        ----------
        samples : sequence of Sample or Exception
            The policy's own.
        tokens : sequence of (list of int or None), optional
            Of each completion. Where they are not known the text is tokenised, with what ends it
            in the policy's template.
        """
        tokens = [None] * len(samples) if tokens is None else tokens
        kept = [
            (sample, ids)
            for sample, ids in zip(samples, tokens, strict=True)
            if isinstance(sample, Sample) and (sample.completion if ids is None else ids)
        ]
        if not kept:
            return None
        places = np.linspace(0, len(kept) - 1, min(self.kl_samples, len(kept))).astype(int)
        chosen = [kept[place] for place in places]
        encoded = encode_sampled(
            self._trainer.processing_class, [s for s, _ in chosen], [ids for _, ids in chosen]
        )
        return mean_kl(self._policy(), self.reference, encoded)


def averaged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each figure over the parts that know it; NaN where none does."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: mean_of([part.get(name, math.nan) for part in parts]) for name in names}
