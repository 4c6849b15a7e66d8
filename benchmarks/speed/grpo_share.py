"""The reward call's and the monitor's share of a GRPO step, through TRL's own trainer, one thread.

The policy is SmolLM2-135M-Instruct with LoRA, 8 completions of at most 32 tokens of one prompt a
step; the reward is five heads with a view each on the same backbone (random vectors: what a weight
is does not matter to time). The first step is left out. `reward_share` is the whole call, its
metrics and columns included, `logging_share` those alone; `monitor_share` what the callback takes
without the KL; `kl_share` one measurement of the KL on 4 completions, spread over the 20 steps from
one to the next, which are its defaults.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser
from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import random_heads
from ensemble_rm import RewardEnsemble, TrunkOptions
from ensemble_rm.aggregation import lcb
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members import HeadScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import View, default_views
from ensemble_rm.rl import OverOptimisationMonitor, trl_reward
from ensemble_rm.rl.monitor.trl_callback import MonitorCallback

ASKED = ["What is rain?", "Name three fruits.", "How do I sleep better?", "Tell me of the sea."]
K, WIDTH, DEPTH = 5, 576, 30


def timed(spent: dict[str, list[float]], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        began = perf_counter()
        found = work(*args, **options)
        spent[name].append(perf_counter() - began)
        return found

    return call


def main() -> None:
    args = make_parser(__doc__).parse_args()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    figures = Figures(args)
    backbone = locate(package_folder("smollm2"))
    views = [View(view.layer, "both") for view in default_views(DEPTH, K)]
    heads = random_heads(K, 2 * WIDTH)
    scorer = HeadScorer(backbone, TrunkOptions(device="cpu"), views, heads)
    ensemble = RewardEnsemble((scorer,), Normaliser((0.0,) * K, (30.0,) * K), lcb(kappa=1.0))
    reward = trl_reward(ensemble)
    monitor = OverOptimisationMonitor(ensemble)
    watch = MonitorCallback(reward, monitor, kl_every=1)
    spent: dict[str, list[float]] = defaultdict(list)

    class Timed:
        __name__ = "ensemble"

        def __call__(self, *values: Any, **options: Any) -> Any:
            return timed(spent, "reward", reward)(*values, **options)

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            spent["end"].append(perf_counter())

    for owner, name in ((reward, "_log"), (watch, "measure_kl"), (watch, "on_step_end")):
        setattr(owner, name, timed(spent, name, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=str(Path(folder) / "run"),
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=32,
            max_steps=3 if args.quick else 7,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(backbone.folder),
            reward_funcs=Timed(),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ASKED * 4}),
            processing_class=AutoTokenizer.from_pretrained(backbone.folder),
            peft_config=LoraConfig(r=8, task_type="CAUSAL_LM"),
        )
        watch.attach(trainer)
        trainer.add_callback(Steps())
        trainer.train()
    report(figures, spent)
    figures.write()


def report(figures: Figures, spent: dict[str, list[float]]) -> None:
    """Give each part's share of every step but the first; a step's own KL is not counted in it."""
    ends = spent["end"]
    shares: dict[str, list[float]] = defaultdict(list)
    for i in range(1, len(ends)):
        kl = spent["measure_kl"][i]
        step = ends[i] - ends[i - 1] - kl
        shares["seconds_per_step"].append(step)
        shares["reward_share"].append(spent["reward"][i] / step)
        shares["logging_share"].append(spent["_log"][i] / step)
        shares["monitor_share"].append(spent["on_step_end"][i] / step)
        shares["kl_share"].append(kl / 20 / step)
    for name, values in shares.items():
        figures.add_repeats(name, values)


if __name__ == "__main__":
    main()
