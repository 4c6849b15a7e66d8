"""One run of `grpo.py`: SmolLM2 with LoRA under TRL's GRPOTrainer, a row a step, resumable.

Gold is a second reward function of weight 0, so that TRL logs it and no gradient reads it. The
rollouts are drawn by `lm_sampling`, through TRL's `rollout_func`: a step's prompts have one length,
so that nothing is padded on the left, and each step has a generator of its own, so that a run that
was cut goes on as if it had not been. Knows nothing of figures.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.overoptimisation.lm_sampling import Sampler
from ensemble_rm import RewardEnsemble
from ensemble_rm.aggregation import mean, uwo
from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.rl import OverOptimisationMonitor, trl_reward
from ensemble_rm.rl.monitor.trl_callback import MonitorCallback

ARMS: dict[str, tuple[str, Aggregator]] = {
    "single": ("single", mean()),
    "views_mean": ("views", mean()),
    "views_uwo": ("views", uwo(0.5)),
}
TILE = 1024  # tokens of the vocabulary
SHOWN = 3  # completions of a step that are kept, to be read


@dataclass(frozen=True)
class Plan:
    """What every run shares.

    Attributes
    ----------
    steps : int
    prompts, copies : int
        Prompts of a step, and completions of each.
    tokens : int
        Most new tokens of a completion.
    learning_rate : float
        Constant.
    rank : int
        Of the adapters, on the attention's queries and values.
    kl_every : int
        Steps from one measurement of the KL to the next.
    save_every : int
        Steps from one checkpoint to the next.
    """

    steps: int = 40
    prompts: int = 2
    copies: int = 8
    tokens: int = 24
    learning_rate: float = 2e-3
    rank: int = 16
    kl_every: int = 2
    save_every: int = 5


@dataclass(frozen=True)
class Run:
    """One arm, at one β, from one seed."""

    arm: str
    beta: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-beta{self.beta:g}-seed{self.seed}"


def prompt_order(prompts: Sequence[str], tokenizer: Any, plan: Plan, seed: int) -> list[str]:
    """Return a run's prompts, a step's together: all of one length, no prompt twice.

    Parameters
    ----------
    prompts : sequence of str
        What there is to ask.
    tokenizer : transformers tokenizer
    plan : Plan
    seed : int
        Of the order, which all arms share.
    """
    rng = np.random.default_rng((seed, 11))
    by_length: dict[int, list[str]] = {}
    for i in rng.permutation(len(prompts)):
        by_length.setdefault(len(encode(tokenizer, prompts[i])), []).append(prompts[i])
    steps = [
        group[at : at + plan.prompts]
        for _, group in sorted(by_length.items())
        for at in range(0, len(group) - plan.prompts + 1, plan.prompts)
    ]
    if len(steps) < plan.steps:
        raise SystemExit(f"{len(prompts)} prompts make {len(steps)} steps, not {plan.steps}")
    return [prompt for i in rng.permutation(len(steps))[: plan.steps] for prompt in steps[i]]


def encode(tokenizer: Any, prompt: str) -> list[int]:
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )
    return list(told["input_ids"])


class Rollout:
    """What TRL calls for a step's completions."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.sampler: Sampler | None = None
        self.written: list[str] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        tokenizer, copies = trainer.processing_class, self.plan.copies
        if self.sampler is None:
            model = trainer.model.get_base_model()  # the adapters stand within it
            self.sampler = Sampler(model, eos=tokenizer.eos_token_id)
        asked = [prompt[0]["content"] for prompt in prompts[::copies]]
        encoded = [encode(tokenizer, prompt) for prompt in asked]
        key = np.random.SeedSequence((self.seed, trainer.state.global_step))
        generator = torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        drawn = self.sampler.sample(
            torch.tensor(encoded), copies=copies, tokens=self.plan.tokens, generator=generator
        )
        ids = [row[row >= 0].tolist() for row in drawn]
        self.written = tokenizer.batch_decode(ids[::copies], skip_special_tokens=True)
        return {
            "prompt_ids": [row for row in encoded for _ in range(copies)],
            "completion_ids": ids,
            "logprobs": None,
        }


class Rows(TrainerCallback):
    """Writes a row a step, and tells the monitor of gold."""

    def __init__(self, file: Path, watch: MonitorCallback, rollout: Rollout) -> None:
        self.file, self.watch, self.rollout = file, watch, rollout
        self.began = time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        kept = [row for row in read_rows(self.file) if row["step"] <= state.global_step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.began = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        logs = given["logs"]
        if "reward" not in logs:
            return
        gold, kl = logs["rewards/gold/mean"], logs.get("monitor/kl")
        if kl is not None:
            self.watch.monitor.check_gold(gold)
        record = self.watch.monitor.records[-1].to_json()
        row = record | {
            "gold": gold,
            "length": logs["completions/mean_length"],
            "cut": logs["completions/clipped_ratio"],
            "correlation": logs.get("proxy/member_correlation"),
            "entropy": logs["entropy"],
            "alarms": logs["monitor/alarms"],
            "processor_seconds": time.process_time() - self.began,
            "written": self.rollout.written[:SHOWN],
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a run so far; a last line that was cut is left out."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def checkpoint_of(folder: Path) -> str | None:
    """Return the last whole checkpoint: one that was being written has no state yet."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def run_one(
    run: Run,
    plan: Plan,
    folder: Path,
    *,
    policy: Path,
    prompts: Sequence[str],
    proxy: RewardEnsemble,
    gold: RewardEnsemble,
) -> list[dict[str, Any]]:
    """Return a run's rows; what of them is missing is trained now.

    Parameters
    ----------
    run : Run
    plan : Plan
    folder : Path
        Of the run's rows and checkpoints. One of another plan is an error.
    policy : Path
        A causal language model.
    prompts : sequence of str
    proxy, gold : RewardEnsemble
        The proxy's aggregator is the arm's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_plan(folder / "plan.json", asdict(plan) | asdict(run))
    rows = read_rows(folder / "rows.jsonl")
    if len(rows) < plan.steps:
        trainer = make_trainer(run, plan, folder, policy, prompts, proxy, gold)
        with completions_alone():
            trainer.train(resume_from_checkpoint=checkpoint_of(folder / "checkpoints"))
    return read_rows(folder / "rows.jsonl")[: plan.steps]


def check_plan(file: Path, said: dict[str, Any]) -> None:
    """Hold a folder to one plan; how long its run is may change, for the rate is constant."""
    free = {"steps", "save_every"}
    kept = json.loads(file.read_text()) if file.exists() and file.stat().st_size else said
    if any(kept[name] != said[name] for name in said.keys() - free):
        raise SystemExit(f"{file.parent} is of another plan: delete it, or give another --work")
    file.write_text(json.dumps(said))


@contextmanager
def completions_alone() -> Iterator[None]:
    """Let TRL project onto the vocabulary what it reads: the completions, in tiles that stay near.

    Without Triton it projects the prompts, too, and throws that away, to spare compilers new
    shapes; nothing is compiled here.
    """
    from trl.trainer import utils

    kept = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = lambda _device: True, TILE
    try:
        yield
    finally:
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = kept


def make_trainer(
    run: Run,
    plan: Plan,
    folder: Path,
    policy: Path,
    prompts: Sequence[str],
    proxy: RewardEnsemble,
    gold: RewardEnsemble,
) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    asked = prompt_order(prompts, tokenizer, plan, run.seed)
    reward = trl_reward(proxy, name="proxy")
    rollout = Rollout(plan, run.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rollout_func")  # that it may change one day
        trainer = GRPOTrainer(
            model=str(policy),
            reward_funcs=[reward, trl_reward(gold, name="gold")],
            args=config_of(run, plan, folder / "checkpoints"),
            train_dataset=Dataset.from_dict({"prompt": [[turn(prompt)] for prompt in asked]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=plan.rank,
                lora_alpha=2 * plan.rank,
                target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            ),
            rollout_func=rollout,
        )
    watch = MonitorCallback(
        reward,
        OverOptimisationMonitor(proxy),
        kl_every=plan.kl_every,
        kl_samples=plan.prompts * plan.copies,
        records=folder / "records.jsonl",
    )
    watch.attach(trainer)
    trainer.add_callback(Rows(folder / "rows.jsonl", watch, rollout))
    return trainer


def turn(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def config_of(run: Run, plan: Plan, output: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(output),
        # On a CPU the fused attention's backward pass takes as long as all matrix products.
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
        per_device_train_batch_size=plan.prompts * plan.copies,
        num_generations=plan.copies,
        max_completion_length=plan.tokens,
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        beta=run.beta,
        reward_weights=[1.0, 0.0],
        shuffle_dataset=False,
        seed=run.seed,
        logging_steps=1,
        save_steps=plan.save_every,
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        bf16=False,  # no autocast: the weights are bfloat16, the adapters float32
        activation_checkpointing=False,
        disable_tqdm=True,
    )
