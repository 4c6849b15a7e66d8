"""The monitor as a callback of TRL's trainers: it warns, stops the run, or raises β.

Without a penalty, TRL has no reference model and logs no KL. The callback then measures it every
few steps, on some completions, against the policy that the run started with.
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
    """Monitors a run of GRPOTrainer or RLOOTrainer; call `attach` before `train`.

    Parameters
    ----------
    reward : TRLReward
        The run's reward function.
    monitor : OverOptimisationMonitor
        The monitor; its rule raises the alarms.
    action : {"warn", "stop", "raise_beta"}
        What an alarm does: "warn" logs a warning; "stop" also ends training after the step;
        "raise_beta" also multiplies β by `beta_factor`, and again after every `window` steps of the
        rule while the alarm lasts.
    beta_factor : float
        > 1.
    kl_every : int
        Steps between two measurements of the KL; 0 measures none. It is the main cost of the
        monitor: with 8 completions per step and the defaults, well below 1 % of the run.
    kl_samples : int
        Number of completions to measure it on.
    reference : torch.nn.Module, optional
        The policy that the run started with (default: TRL's reference model; else, for a LoRA
        policy, the policy without its adapter; else a copy of the policy, made when training
        begins, which needs as much memory again).
    records : str or Path, optional
        JSONL file to write the records to after each step.
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
            raise OptionError(
                f"kl_every must be >= 0 and kl_samples >= 1, not {kl_every!r} and {kl_samples!r}"
            )
        self.reward, self.monitor, self.action = reward, monitor, action
        self.beta_factor, self.kl_every, self.kl_samples = beta_factor, kl_every, kl_samples
        self.reference, self.records = reference, records
        self.alarms: list[Alarm] = []
        self._trainer: Any = None
        self._calls: list[_Call] = []
        self._kl: float | None = None  # of the current step
        self._active: dict[str, int] = {}  # alarm -> step of its last action
        self._figures: list[dict[str, float]] = []  # of the steps since the last log
        self._logged = 0  # the last log's step

    def attach(self, trainer: Any) -> MonitorCallback:
        """Attach to a trainer.

        Parameters
        ----------
        trainer : GRPOTrainer or RLOOTrainer

        Returns
        -------
        MonitorCallback
            Itself.

        Raises
        ------
        LoopError
            If β is to be raised in a run without a penalty, or whose loss has fixed it.
        """
        if self.action == "raise_beta":
            if not trainer.beta > 0:
                raise LoopError(
                    f"action='raise_beta' needs a run with beta > 0, not {trainer.beta}: TRL has "
                    "no reference model without; set beta in its config"
                )
            if getattr(trainer.args, "use_liger_kernel", False):
                raise LoopError("use_liger_kernel fixes beta at the start; switch it off")
        self._trainer = trainer
        self.reward.watched_by(self._collect)
        # First, so that reporting callbacks see the figures that it adds to the logs.
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def _collect(
        self,
        samples: list[Sample | Exception],
        rewards: LoopRewards,
        tokens: list[list[int] | None],
    ) -> None:
        # TRL calls rewards in evaluation as well.
        if self._trainer.model.training:  # an evaluation is not the run
            self._calls.append((samples, rewards, tokens))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Keep the policy that the run starts with; a resumed run continues its records."""
        if state.global_step > 0 and self.records is not None and Path(self.records).is_file():
            self.monitor.restore(self.records, until=state.global_step)
        model = self._policy()
        # An adapter that is switched off is the reference: no copy of the model is needed.
        if self.kl_every == 0 or self.reference is not None or hasattr(model, "disable_adapter"):
            return
        self.reference = self._trainer.ref_model
        if self.reference is not None:
            return
        # The weights in memory are the checkpoint's, not those of the run's start.
        if state.global_step > 0:
            raise OptionError(
                f"a run resumed at step {state.global_step} does not have the policy that it "
                "started with; pass it as reference, or kl_every=0"
            )
        reference = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        # TRL and accelerate store closures over the policy there; a copy's would run the policy.
        vars(reference).pop("forward", None)
        self.reference = reference

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Measure the KL before the update, while the policy is the one that sampled."""
        step = state.global_step + 1
        # The first step has no update yet and gives the KL's zero point.
        due = self.kl_every > 0 and (step % self.kl_every == 0 or not self.monitor.records)
        if due and self._calls:
            samples = [sample for part, _rewards, _tokens in self._calls for sample in part]
            tokens = [ids for _samples, _rewards, part in self._calls for ids in part]
            self._kl = self.measure_kl(samples, tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """Record the step's reward calls, and act on alarms."""
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
        # All ranks act together: a rank that stopped alone would leave the others waiting.
        ranks = gather_object([(alarms, figures)])
        self._figures.append(averaged([figures for _alarms, figures in ranks]))
        self._act([a for alarms, _figures in ranks for a in alarms], state.global_step, control)
        return control

    def _of_step(self, step: int, alarms: list[Alarm]) -> dict[str, float]:
        """Return the figures that the reward does not log itself; none if all samples failed."""
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
        # Gold checks come from outside, at steps of their own.
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
        # An alarm that has ended may be raised again.
        self._active = {kind: at for kind, at in self._active.items() if kind in kinds}
        raised = {}
        for alarm in alarms:
            if alarm.kind not in self._active:
                raised[alarm.kind] = alarm
        # An alarm that lasts a whole window raises beta once more, not at every step.
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
            log.warning("step %d: beta is now %g", step, self._trainer.beta)

    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def measure_kl(
        self,
        samples: Sequence[Sample | Exception],
        tokens: Sequence[list[int] | None] | None = None,
    ) -> float | None:
        """Estimate KL(policy ‖ the run's first policy), nats per completion, on some samples.

        By the estimator k3, on the tokens that the policy sampled; None if no sample can be read.

        Parameters
        ----------
        samples : sequence of Sample or Exception
            Samples of the policy.
        tokens : sequence of (list of int or None), optional
            Token ids of each completion. If they are unknown, the text is tokenised, with the end
            of turn of the policy's template.
        """
        tokens = [None] * len(samples) if tokens is None else tokens
        kept = [
            (sample, ids)
            for sample, ids in zip(samples, tokens, strict=True)
            if isinstance(sample, Sample) and (sample.completion if ids is None else ids)
        ]
        if not kept:
            return None
        # Evenly spread over the step's samples, so that several prompts are among them.
        rows = np.linspace(0, len(kept) - 1, min(self.kl_samples, len(kept))).astype(int)
        chosen = [kept[row] for row in rows]
        encoded = encode_sampled(
            self._trainer.processing_class, [s for s, _ in chosen], [ids for _, ids in chosen]
        )
        return mean_kl(self._policy(), self.reference, encoded)


def averaged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each figure over the parts that have it; NaN if none has."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: mean_of([part.get(name, math.nan) for part in parts]) for name in names}
