"""The monitor as a callback of TRL's trainers: it warns, stops, or raises β.

Without a penalty TRL holds no reference model and logs no KL: the callback then measures it itself,
on a sample of each few steps' completions, against the policy that the run began with.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from ensemble_rm.errors import NoPenaltyError, OptionError
from ensemble_rm.members.batching import batches
from ensemble_rm.members.implicit import token_log_probs
from ensemble_rm.members.text import TextEncoder
from ensemble_rm.rl.kl import sequence_kl
from ensemble_rm.rl.monitor import OverOptimisationMonitor
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.rl.trl import TRLReward
from ensemble_rm.rl.watching import Alarm
from ensemble_rm.samples import Sample

Action: TypeAlias = Literal["warn", "stop", "raise_beta"]
_ACTIONS = ("warn", "stop", "raise_beta")
_MAX_LENGTH = 4096
_KL_TOKENS = 2048

log = logging.getLogger(__name__)


class MonitorCallback(TrainerCallback):
    """Watches a run of GRPOTrainer or RLOOTrainer; `attach` it before `train`.

    Parameters
    ----------
    reward : TRLReward
        The run's reward function, made by `reward_function`.
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
        self._calls: list[tuple[list[Sample | Exception], LoopRewards]] = []
        self._active: dict[str, int] = {}  # alarm -> step of its last action

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
        NoPenaltyError
            If β is to be raised in a run that has none, or whose loss has taken it already.
        """
        if self.action == "raise_beta":
            if not trainer.beta > 0:
                raise NoPenaltyError(
                    f"β can be raised only in a run that was started with β > 0, and this one has "
                    f"{trainer.beta}: without, TRL holds no reference model; set beta in its config"
                )
            if getattr(trainer.args, "use_liger_kernel", False):
                raise NoPenaltyError("use_liger_kernel fixes β at the start; switch it off")
        self._trainer = trainer
        self.reward.watched_by(self._collect)
        trainer.add_callback(self)
        return self

    def _collect(self, samples: list[Sample | Exception], rewards: LoopRewards) -> None:
        if self._trainer.model.training:  # an evaluation is not the run
            self._calls.append((samples, rewards))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Keep the policy that the run begins with, where nobody else does."""
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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        """Take in the step's reward calls, and act."""
        calls, self._calls = self._calls, []
        alarms: list[Alarm] = []
        if calls:
            samples = [sample for part, _rewards in calls for sample in part]
            due = self.kl_every > 0 and (
                state.global_step % self.kl_every == 0 or not self.monitor.records
            )
            kl = self.measure_kl(samples) if due else None
            rewards = joined([rewards for _samples, rewards in calls])
            alarms = self.monitor.observe(state.global_step, samples, rewards, kl=kl)
            if self.records is not None:
                self.monitor.save(self.records)
        # Every rank acts as one: a rank that stopped alone would leave the others waiting.
        alarms = gather_object(alarms)
        self._act(alarms, state.global_step, control)
        return control

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

    def measure_kl(self, samples: list[Sample | Exception]) -> float | None:
        """Estimate KL(policy ‖ the run's first policy), nats a completion, on some samples.

        By the estimator k3, on the completions' text in the policy's own template; None where no
        sample can be read. Neither dropout nor a generator has a part in it.

        Parameters
        ----------
        samples : list of Sample or Exception
            The policy's own.
        """
        kept = [sample for sample in samples if isinstance(sample, Sample) and sample.completion]
        if not kept:
            return None
        places = np.linspace(0, len(kept) - 1, min(self.kl_samples, len(kept))).astype(int)
        encoder = TextEncoder(self._trainer.processing_class, max_length=_MAX_LENGTH)
        if encoder.template == "pair":
            encoder = TextEncoder(encoder.tokenizer, template="plain", max_length=_MAX_LENGTH)
        encoded = encoder.encode([kept[place] for place in places])
        model = self._policy()
        reference = model if self.reference is None else self.reference
        training, found = model.training, []
        model.eval()
        # The class's own, as in the reference: under autocast the two would differ from the start.
        patched = vars(model).pop("forward", None)
        try:
            for batch in batches(encoded, token_budget=_KL_TOKENS, device=model.device):
                with torch.no_grad():
                    ours, inside = token_log_probs(model, batch)
                    plain = model.disable_adapter() if self.reference is None else nullcontext()
                    with plain:
                        theirs, _ = token_log_probs(reference, batch)
                found.append(
                    sequence_kl(
                        ours.cpu().numpy(),
                        theirs.cpu().numpy(),
                        inside.cpu().numpy(),
                        estimator="k3",
                    )
                )
        finally:
            model.train(training)
            if patched is not None:
                vars(model)["forward"] = patched
        return float(np.concatenate(found).mean())


def joined(calls: list[LoopRewards]) -> LoopRewards:
    """Return several calls' rewards as one's."""
    return LoopRewards(
        np.concatenate([call.reward for call in calls]),
        np.concatenate([call.members for call in calls]),
        np.concatenate([call.reference_reward for call in calls]),
        tuple(error for call in calls for error in call.errors),
    )
