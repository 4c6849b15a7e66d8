"""RewardUQ 0.1.0's side of `vs_rewarduq.py`: one run, in RewardUQ's own environment.

Called as `python rewarduq_peer.py JOB.json`; the answer is written to the job's `out`. It holds our
calls of RewardUQ's public entry points only: `MLPHeadEnsemblePipeline.from_config`,
`pipeline.train(train, eval)`, its metrics at the end of training, and for new texts the steps of
its `scripts/run_inference.py`. The configuration is its `configs/method/mlp_head_ensemble/
default.yaml` with the values that the job names.

Two things are done for a BERT encoder, which RewardUQ refuses without a chat template: the
backbone's folder is copied with a template that renders `[CLS] prompt [SEP] completion [SEP]` (the
tokens that ours reads), `[SEP]` is named as the end token, and the tokenizer adds no special tokens
in addition to those. `completion_mask` is left out at inference, since BERT does not take it. Token
types are not passed, as RewardUQ never passes them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

TEMPLATE = (
    "{% set answered = messages[-1]['role'] == 'assistant' and not add_generation_prompt %}"
    "{% set asked = messages[:-1] if answered else messages %}"
    "[CLS]{% for m in asked %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}[SEP]"
    "{% if answered %}{{ messages[-1]['content'] }}[SEP]{% endif %}"
)


def prepare_backbone(source: Path, target: Path) -> Path:
    """Copy a BERT's folder so that RewardUQ takes its tokenizer."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said |= {"chat_template": TEMPLATE, "eos_token": "[SEP]"}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"  # a BertTokenizer adds its own tokens
    file.write_text(json.dumps(said))
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer |= {"post_processor": None, "truncation": None, "padding": None}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def to_dataset(rows: list[dict[str, Any]]) -> Any:
    """Return conversational preference pairs as RewardUQ's loader makes them."""
    from datasets import Dataset

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": answer(row["chosen"]),
                "rejected": answer(row["rejected"]),
                "weight": 1.0,
            }
            for row in rows
        ]
    )


def configure(job: dict[str, Any], backbone: Path, folder: Path) -> Any:
    """Its default.yaml for MLP heads, and what the job says."""
    from omegaconf import OmegaConf

    precision = job["dtype"] == "bfloat16"
    return OmegaConf.create(
        {
            "pipeline": "mlp_head_ensemble.MLPHeadEnsemblePipeline",
            "model": {
                "base_model_name_or_path": str(backbone),
                "num_heads": job["members"],
                "feature_extraction_layer": "last_hidden_state",
                "feature_extraction_pooling_strategy": job["pooling"],
                "head_hidden_dim": 128,
                "head_num_layers": 2,
                "head_activation": "ReLU",
                "head_initialization": "xavier_uniform_",
                "head_initialization_kwargs": {"gain": 1.0},
                "reward_function": "mean",
                "bounds_function": "std",
                "bounds_function_std_beta": 2.0,
            },
            "trainer": {
                "precompute_features": True,
                "precompute_features_path": str(folder / "features"),
                "max_length": job["max_length"],
                "num_train_epochs": job["epochs"],
                "learning_rate": job["learning_rate"],
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 16,
                "eval_accumulation_steps": 1,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.05,
                "regularization_towards_initial_weights": job["regularisation"],
                "center_rewards_coefficient": 0.01,
                "bf16": precision,
                "use_cpu": True,
                "eval_strategy": "no",
                "eval_on_end": True,
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "report_to": "none",
                "seed": job["seed"],
                "output_dir": str(folder / "run"),
            },
        }
    )


def train(job: dict[str, Any], backbone: Path, folder: Path) -> tuple[Any, Any, dict[str, float]]:
    """Texts → evaluated ensemble; returns the pipeline, rewards (n, 2) and its own metrics."""
    import numpy as np
    from rewarduq.methods import load_pipeline_from_config
    from rewarduq.utils import ensure_reproducibility

    ensure_reproducibility(seed=job["seed"])
    pipeline = load_pipeline_from_config(configure(job, backbone, folder))
    pipeline.train(to_dataset(job["train"]), to_dataset(job["evaluation"]))
    last = max(
        (folder / "run" / "predictions").glob("rewards_*.npy"),
        key=lambda path: int(path.stem.split("_")[1]),
    )
    metrics = [entry for entry in pipeline.trainer.state.log_history if "eval_win_rate" in entry]
    return pipeline, np.load(last)[:, :, 0], metrics[-1]


def score(pipeline: Any, rows: list[dict[str, Any]], max_length: int) -> Any:
    """Rewards of new pairs, (n, 2), as its scripts/run_inference.py computes them."""
    import numpy as np
    import torch
    from rewarduq.trainers.trainer_extension import DataCollatorForPreference
    from rewarduq.utils import prepare_preference_dataset
    from torch.utils.data import DataLoader

    tokenizer, model = pipeline.model.tokenizer, pipeline.model
    dataset = prepare_preference_dataset(
        dataset=to_dataset(rows),
        processing_class=tokenizer,
        dataset_name="eval",
        max_length=max_length,
    )
    loader = DataLoader(
        dataset,
        batch_size=16,
        collate_fn=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
    )
    model.eval()
    found = []
    with torch.no_grad():
        for batch in loader:
            sides = [
                model(
                    input_ids=batch[f"{side}_input_ids"],
                    attention_mask=batch[f"{side}_attention_mask"],
                )["rewards"][:, 0]
                for side in ("chosen", "rejected")
            ]
            found.append(torch.stack(sides, dim=1).numpy())
    return np.concatenate(found)


def count_tokens(pipeline: Any) -> int:
    """Tokens of both sides of all pairs that it trained and was evaluated on."""
    total = 0
    for dataset in (pipeline.trainer.train_dataset, pipeline.trainer.eval_dataset):
        prompts = sum(len(ids) for ids in dataset["prompt_input_ids"])
        sides = (dataset[f"{side}_input_ids"] for side in ("chosen", "rejected"))
        total += 2 * prompts + sum(len(ids) for column in sides for ids in column)
    return total


def main() -> None:
    if "--help" in sys.argv or len(sys.argv) != 2:
        raise SystemExit(__doc__)
    job = json.loads(Path(sys.argv[1]).read_text())
    began = perf_counter()
    import datasets
    import rewarduq.methods.mlp_head_ensemble  # noqa: F401  its pipeline is imported late
    import torch

    imports = perf_counter() - began
    torch.set_num_threads(job["threads"])
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = prepare_backbone(Path(job["backbone"]), folder / "backbone")
        began, cpu = perf_counter(), process_time()
        pipeline, rewards, metrics = train(job, backbone, folder)
        wall, cpu = perf_counter() - began, process_time() - cpu
        took = []
        for repeat in range(job["score_repeats"] + 1):
            began = perf_counter()
            score(pipeline, job["fresh"], job["max_length"])
            if repeat:  # the first warms up
                took.append(perf_counter() - began)
    answer = {
        "imports": imports,
        "wall": wall,
        "cpu": cpu,
        "score": took,
        "margins": (rewards[:, 0] - rewards[:, 1]).tolist(),
        "tokens": count_tokens(pipeline),
        "ece": metrics["eval_prefs/ece"],
        "accuracy": metrics["eval_win_rate"],
    }
    Path(job["out"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
