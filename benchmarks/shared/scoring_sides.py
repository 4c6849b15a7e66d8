"""Workloads and sides of `scoring.py`: what is scored, by whom."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_rm import Sample, TrunkOptions, load_preferences
from ensemble_rm.members import BranchScorer, HeadScorer, LoraRecipe
from ensemble_rm.members.backbone.checkpoint import Backbone, load_classifier, load_tokenizer
from ensemble_rm.members.backbone.trunk import Trunk, View, default_views
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.lora.adapters import adapt, own_tensors
from ensemble_rm.members.lora.scorer import LoraScorer

K = 5  # members


# Workloads -----------------------------------------------------------------------------------


def words(n: int, rng: np.random.Generator) -> str:
    return " ".join(
        rng.choice(
            ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"],
            n,
        )
    )


def groups(
    args: argparse.Namespace,
    tokenizer: Any,
    *,
    completions: int = 16,
    completion_tokens: int = 64,
    prompt_tokens: tuple[int, int] = (170, 200),
) -> list[Sample]:
    """Prompts with several completions each, of at most so many tokens."""
    rng = np.random.default_rng(0)

    def cut(text: str) -> str:
        return str(tokenizer.decode(tokenizer(text)["input_ids"][:completion_tokens]))

    if not args.data.exists():
        asked = [words(prompt_tokens[1] - 20, rng) for _ in range(args.prompts)]
        return [
            Sample(p, words(rng.integers(20, 60), rng)) for p in asked for _ in range(completions)
        ]
    pairs = load_preferences(args.data)
    answers = [cut(pair.chosen) for pair in pairs[:400] if len(pair.chosen) > 120]
    found = []
    for pair in pairs:
        turns = pair.prompt if isinstance(pair.prompt, tuple) else ()
        length = sum(len(tokenizer(turn.content)["input_ids"]) + 5 for turn in turns)
        if prompt_tokens[0] <= length <= prompt_tokens[1]:
            found.append(pair.prompt)
        if len(found) == args.prompts:
            break
    return [Sample(p, str(rng.choice(answers))) for p in found for _ in range(completions)]


def pairs_in_order(args: argparse.Namespace) -> list[Sample]:
    """Both completions of each pair, in order of arrival."""
    if args.data.exists():
        pairs = load_preferences(args.data).shuffled_sides(seed=0)
        rows = np.random.default_rng(1).permutation(len(pairs))[: args.pairs]
        return [Sample(p.prompt, c) for p in pairs.take(rows) for c in (p.chosen, p.rejected)]
    rng = np.random.default_rng(1)
    asked = [words(rng.integers(10, 300), rng) for _ in range(args.pairs)]
    return [Sample(p, words(rng.integers(5, 120), rng)) for p in asked for _ in range(2)]


# Sides ---------------------------------------------------------------------------------------


def random_heads(k: int, width: int) -> HeadWeights:
    rng = np.random.default_rng(0)
    return HeadWeights(
        np.zeros((k, width)), np.ones((k, width)), rng.normal(size=(k, width)), np.zeros(k)
    )


def branches(backbone: Backbone, options: TrunkOptions, blocks: int, k: int = K) -> BranchScorer:
    trunk = Trunk(backbone, options)
    copied = torch.nn.ModuleList(list(trunk.blocks)[trunk.depth - blocks :]).state_dict()
    views = [View(trunk.depth, "both")] * k
    heads = random_heads(k, 2 * trunk.width)
    return BranchScorer(backbone, options, views, heads, [dict(copied)] * k, blocks=blocks)


def heads(backbone: Backbone, options: TrunkOptions, k: int = K) -> HeadScorer:
    trunk = Trunk(backbone, options)
    return HeadScorer(
        backbone, options, default_views(trunk.depth, k), random_heads(k, 2 * trunk.width)
    )


def adapters(backbone: Backbone, options: TrunkOptions, k: int = K) -> LoraScorer:
    """Adapters of rank 16 on every linear layer of all blocks, their weights drawn from a seed."""
    trunk = Trunk(backbone, options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = own_tensors(adapt(trunk.blocks, LoraRecipe().adapter))
        tensors = [
            {name: 0.01 * torch.randn_like(value) for name, value in shapes.items()}
            for _ in range(k)
        ]
    return LoraScorer(
        backbone,
        options,
        [View(trunk.depth, "both")] * k,
        random_heads(k, 2 * trunk.width),
        tensors,
        blocks=trunk.depth,
        lora=LoraRecipe().adapter,
    )


class HuggingFace:
    """k models in a loop, each in batches of 16 padded in order of arrival."""

    def __init__(self, folder: Path, options: TrunkOptions, k: int) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.padding_side = "right"
        self.made = [load_classifier(folder, dtype=options.dtype).eval() for _ in range(k)]
        self.max_length = options.max_length

    def models(self) -> Iterator[Any]:
        """Yield one model after the other."""
        yield from self.made

    def texts(self, samples: list[Sample]) -> list[str]:
        return [
            self.tokenizer.apply_chat_template(
                [
                    *(
                        [{"role": "user", "content": s.prompt}]
                        if isinstance(s.prompt, str)
                        else [{"role": t.role, "content": t.content} for t in s.prompt]
                    ),
                    {"role": "assistant", "content": s.completion},
                ],
                tokenize=False,
            )
            for s in samples
        ]

    @torch.inference_mode()
    def score(self, samples: list[Sample]) -> np.ndarray:
        texts = self.texts(samples)
        found = []
        for model in self.models():
            scores = []
            for i in range(0, len(texts), 16):
                batch = self.tokenizer(
                    texts[i : i + 16],
                    padding=True,
                    truncation=True,
                    max_length=self.max_length,
                    add_special_tokens=False,
                    return_tensors="pt",
                )
                scores.append(model(**batch).logits[:, 0].float().numpy())
            found.append(np.concatenate(scores))
        return np.stack(found, axis=1)


class Switched(HuggingFace):
    """One model under k adapters, switched in turn, as peft's users do."""

    def __init__(self, folder: Path, options: TrunkOptions, k: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(folder, options, 1)
        (base,) = self.made
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=16, lora_alpha=32, target_modules=layers)
        self.adapted = get_peft_model(base, config, adapter_name="0").eval()
        for i in range(1, k):
            self.adapted.add_adapter(str(i), config)
        with torch.no_grad():
            for name, p in self.adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.01)
        self.names = [str(i) for i in range(k)]

    def models(self) -> Iterator[Any]:
        """Yield the model under one adapter after the other."""
        for name in self.names:
            self.adapted.set_adapter(name)
            yield self.adapted


def pipeline(folder: Path, options: TrunkOptions) -> Callable[[list[str]], Any]:
    from transformers import pipeline as make

    return make(
        "text-classification",
        model=load_classifier(folder, dtype=options.dtype),
        tokenizer=load_tokenizer(folder),
        batch_size=32,
        truncation=True,
        max_length=options.max_length,
        function_to_apply="none",
    )


def make_classifier(backbone: Backbone, folder: Path) -> Path:
    """Make a sequence-classification model over the backbone, its head drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_classifier(backbone.folder, dtype="bfloat16", new_head=True)
    tokenizer = load_tokenizer(backbone.folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
