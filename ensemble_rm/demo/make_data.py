"""Make the demo's data: completions sampled from a real model, judged by the simulated annotator.

``python -m ensemble_rm.demo.make_data MODEL_FOLDER`` writes ``data/preferences.jsonl.gz``. The
shipped file came from SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_rm.demo.annotator import true_probability

Turns = str | list[str]
"""A prompt of prompts.json: a question, or turns that begin and end with the user."""

HERE = Path(__file__).parent
OUT = HERE / "data" / "preferences.jsonl.gz"


def messages(prompt: Turns) -> list[dict[str, str]]:
    """Return a prompt as messages."""
    turns = [prompt] if isinstance(prompt, str) else prompt
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def sample(
    folder: str, prompts: list[Turns], *, count: int, tokens: int, seed: int
) -> list[list[str]]:
    """Return `count` sampled completions per prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, padding_side="left", trust_remote_code=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    found = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for i in range(0, len(prompts), 16):
            texts = [
                tokenizer.apply_chat_template(
                    messages(prompt),
                    tokenize=False,
                    add_generation_prompt=True,
                )
                for prompt in prompts[i : i + 16]
            ]
            batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(
                **batch,
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.1,
                top_p=0.95,
                num_return_sequences=count,
            )
            new = tokenizer.batch_decode(
                out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            found += [[t.strip() for t in new[j : j + count]] for j in range(0, len(new), count)]
            print(f"{len(found)} of {len(prompts)} prompts", flush=True)
    return found


def judge(
    prompts: dict[str, list[Turns]], completions: list[list[str]], *, seed: int
) -> list[dict[str, Any]]:
    """Return every pair of different completions as a row, its verdict drawn from the truth."""
    rng = np.random.default_rng(seed)
    asked = [(kind, prompt) for kind, group in prompts.items() for prompt in group]
    rows: list[dict[str, Any]] = []
    for (kind, prompt), texts in zip(asked, completions, strict=True):
        question = prompt if isinstance(prompt, str) else prompt[-1]
        for first, second in combinations(dict.fromkeys(filter(None, texts)), 2):
            p = true_probability(question, first, second)
            won = bool(rng.random() < p)
            chosen, rejected = (first, second) if won else (second, first)
            rows.append(
                {
                    "prompt": prompt if isinstance(prompt, str) else messages(prompt),
                    "chosen": chosen,
                    "rejected": rejected,
                    "subset": kind,
                    "id": f"demo-{len(rows)}",
                    "true_probability": round(p if won else 1 - p, 6),
                }
            )
    return rows


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder of a causal language model")
    parser.add_argument("--count", type=int, default=4, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts: dict[str, list[Turns]] = json.loads(
        (HERE / "prompts.json").read_text(encoding="utf-8")
    )
    flat = [prompt for group in prompts.values() for prompt in group]
    completions = sample(args.folder, flat, count=args.count, tokens=args.tokens, seed=args.seed)
    rows = judge(prompts, completions, seed=args.seed)
    OUT.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    OUT.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(rows)} pairs of {len(flat)} prompts in {OUT}")


if __name__ == "__main__":
    main()
