"""A tiny run of TRL's GRPOTrainer, for the tests of what hangs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def grpo(
    folder: Path, reward: Any, tmp_path: Path, data: Any, *, lora: Any = None, **options: Any
) -> Any:
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        activation_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
