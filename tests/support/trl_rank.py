"""One rank of a run of TRL's GRPOTrainer, started by a launcher; see `test_rl_launched.py`.

Writes what it saw, FOLDER/rank-N.json: the samples that it scored, their rewards, the trainer's
logs and the step at which it ended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from datasets import Dataset

from ensemble_rm import Sample
from ensemble_rm.rl import AlarmRule, OverOptimisationMonitor, PinnedEnsemble, trl_reward
from ensemble_rm.rl.monitor.trl_callback import MonitorCallback
from tests.support.trl_runs import tiny_run


def main(policy: str, saved: str, folder: Path, stop_rank: int) -> None:
    reward = trl_reward(PinnedEnsemble(saved, device="cpu"))
    data = Dataset.from_dict({"prompt": ["Say hello", "Say no", "Why is it so"] * 2})
    trainer = tiny_run(
        Path(policy),
        reward,
        folder,
        data,
        beta=0.05,
        learning_rate=0.05,
        ddp_backend="gloo",
        batch=2,
    )
    rank = trainer.accelerator.process_index
    # Of the ranks, one alone has a rule that is broken, at the second step.
    rule = AlarmRule(max_kl=1e-9 if rank == stop_rank else 1e9)
    watch = MonitorCallback(
        reward,
        OverOptimisationMonitor(reward.pinned.ensemble, rule=rule),
        action="stop",
        kl_every=1,
    )
    watch.attach(trainer)
    calls = []
    collect = watch._collect

    def record(samples, rewards, tokens):  # type: ignore[no-untyped-def]
        kept = [[s.prompt, s.completion] for s in samples if isinstance(s, Sample)]
        calls.append({"samples": kept, "rewards": rewards.listed()})
        collect(samples, rewards, tokens)

    reward.watched_by(record)
    trainer.train()
    said = {
        "calls": calls,
        "logs": trainer.state.log_history,
        "step": trainer.state.global_step,
        "ranks": trainer.accelerator.num_processes,
        "records": [record.to_json() for record in watch.monitor.records],
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))
    trainer.accelerator.end_training()
    # Past the interpreter's end, which aborts where a thread of torch's then wants its lock.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
