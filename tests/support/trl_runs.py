"""A tiny run of TRL's GRPOTrainer, or RLOOTrainer, for the tests of what hangs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_run(
    folder: Path,
    reward: Any,
    tmp_path: Path,
    data: Any,
    *,
    kind: str = "GRPO",
    lora: Any = None,
    batch: int = 4,
    **options: Any,
) -> Any:
    """Return a trainer of three steps of four completions of at most six tokens.

    `batch` is each rank's: two ranks share a step of four.
    """
    import trl
    from transformers import AutoTokenizer

    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no"} | options
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=batch,
        num_generations=4,
        max_completion_length=6,
        report_to=[],
        use_cpu=True,
        activation_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        seed=1,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return getattr(trl, f"{kind}Trainer")(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
