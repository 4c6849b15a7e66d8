"""Scoring with five members against today's practice, SmolLM2-135M in bfloat16, one thread.

Both sides run in turn, warm, tokenisation included, under the same dtype, threads and maximum
length. Workloads: `group16`, prompts of about 200 tokens with 16 completions of at most 64 each;
`pairs`, chosen and rejected of hh_rlhf.jsonl in order of arrival. Texts are made of words where
that file is absent. Peers: `one` Hugging Face model, batches of 16 padded in order of arrival; the
`loop` over five of them; a `switch` of five peft adapters on one; transformers'
text-classification `pipeline` at batch 32; and the `limit`, the backbone's forward pass on dense
batches without padding, in tokens a second, against our real tokens a second without prefix
sharing.

Branches are copies of the last blocks and heads are random vectors: what a weight is does not
matter to time. Ratios are theirs/ours, above 1 is in our favour; `limit` is ours/theirs. Memory:
weights of five branches against (1 + (k − 1)·m·block/total) of one model, and peak resident memory
above the imports, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Figures, make_parser, seconds
from preference_runs import package_folder

from ensemble_rm import (
    BranchScorer,
    ClassifierScorer,
    HeadScorer,
    LoraOptions,
    Sample,
    TrunkOptions,
    load_preferences,
)
from ensemble_rm.members.adapters import adapt, own_tensors
from ensemble_rm.members.backbone import Backbone, load_classifier, load_tokenizer, locate
from ensemble_rm.members.head_weights import HeadWeights
from ensemble_rm.members.lora import LoraScorer
from ensemble_rm.members.trunk import Trunk, View, default_views

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf.jsonl"
K = 5


# Workloads -----------------------------------------------------------------------------------


def words(n: int, rng: np.random.Generator) -> str:
    return " ".join(
        rng.choice(
            ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"],
            n,
        )
    )


def groups(args: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    """Prompts of about 200 tokens with 16 completions of at most 64."""
    rng = np.random.default_rng(0)

    def cut(text: str) -> str:
        return str(tokenizer.decode(tokenizer(text)["input_ids"][:64]))

    if not args.data.exists():
        asked = [words(180, rng) for _ in range(args.prompts)]
        return [Sample(p, words(rng.integers(20, 60), rng)) for p in asked for _ in range(16)]
    pairs = load_preferences(args.data)
    answers = [cut(pair.chosen) for pair in pairs[:400] if len(pair.chosen) > 120]
    found = []
    for pair in pairs:
        turns = pair.prompt if isinstance(pair.prompt, tuple) else ()
        length = sum(len(tokenizer(turn.content)["input_ids"]) + 5 for turn in turns)
        if 170 <= length <= 200:
            found.append(pair.prompt)
        if len(found) == args.prompts:
            break
    return [Sample(p, str(rng.choice(answers))) for p in found for _ in range(16)]


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
        shapes = own_tensors(adapt(trunk.blocks, LoraOptions()))
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
        lora=LoraOptions(),
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


# Measuring -----------------------------------------------------------------------------------


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Return each side's seconds, a repeat each, after one warm round; the order alternates."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        order = list(sides) if repeat % 2 else list(reversed(sides))
        took = {name: seconds(sides[name]) for name in order}
        if repeat:
            for name, spent in took.items():
                found[name].append(spent)
        print({name: round(spent, 2) for name, spent in took.items()}, flush=True)
    return {name: np.array(values) for name, values in found.items()}


def compare_groups(
    args: argparse.Namespace, backbone: Backbone, folder: Path, figures: Figures
) -> None:
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    samples = groups(args, load_tokenizer(backbone.folder))
    scorers = {
        "branch5": branches(backbone, options, 2),
        "views5": heads(backbone, options),
        "one": HuggingFace(folder, options, 1),
        "loop": HuggingFace(folder, options, K),
        "lora5": adapters(backbone, options),
        "switch": Switched(folder, options, K),
    }
    took = in_turn(
        {name: (lambda s=scorer: s.score(samples)) for name, scorer in scorers.items()},  # type: ignore[misc]
        args.repeats,
    )
    for ours, peer in (
        ("branch5", "loop"),
        ("branch5", "one"),
        ("views5", "one"),
        ("views5", "loop"),
        ("lora5", "switch"),
    ):
        figures.add_repeats(f"group16_{ours}_vs_{peer}", list(took[peer] / took[ours]))
    # What `train` makes where nothing else is said: heads with a view each.
    figures.add_repeats("group16_default_vs_loop", list(took["loop"] / took["views5"]))


def compare_pairs(args: argparse.Namespace, folder: Path, figures: Figures) -> None:
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    samples = pairs_in_order(args)
    scorer = ClassifierScorer.from_name(folder, options)
    alone = scorer.with_options(replace(options, share_prefix=False))
    texts = HuggingFace(folder, options, 0).texts(samples)
    pipe = pipeline(folder, options)
    encoder, model = alone._open()
    tokens = sum(len(e.ids) for e in encoder.encode(samples))
    ids = torch.randint(100, 40000, (32, 256))

    @torch.inference_mode()
    def limit() -> None:
        for _ in range(args.dense):
            model.base_model(input_ids=ids, use_cache=False)

    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: scorer.score(samples),
        "alone": lambda: alone.score(samples),
        "pipeline": lambda: pipe(texts),
        "limit": limit,
    }
    took = in_turn(sides, args.repeats)
    figures.add_repeats("pairs_vs_pipeline", list(took["pipeline"] / took["ours"]))
    rates = (tokens / took["alone"]) / (args.dense * ids.numel() / took["limit"])
    figures.add_repeats("pairs_vs_limit", list(rates))


def compare_weights(backbone: Backbone, figures: Figures) -> None:
    options = TrunkOptions(dtype="bfloat16", device="cpu")
    scorer = branches(backbone, options, 2)
    branching, copies = scorer._open()

    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    whole = Trunk(backbone, options)
    total, block = size(whole.model), size(whole.blocks[-1])
    bound = 1 + (K - 1) * 2 * block / total
    ratio = size(branching.trunk.model, *copies) / total / bound
    figures.add("weights_branch5_vs_bound", ratio, ratio, ratio, 1)


def resident() -> float:
    """Return this process's peak resident memory, MiB; getrusage would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def peak(side: str, args: argparse.Namespace, folder: Path) -> None:
    """Print this process's peak memory above its imports, in MiB."""
    import transformers.pipelines  # noqa: F401

    began = resident()
    options = TrunkOptions(max_length=512, dtype="bfloat16", device="cpu")
    samples = pairs_in_order(args)
    if side == "ours":
        backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
        branches(backbone, options, 2).score(samples)
    else:
        pipeline(folder, options)(HuggingFace(folder, options, 0).texts(samples))
    print(f"peak {resident() - began}")


def compare_peaks(args: argparse.Namespace, folder: Path, figures: Figures) -> None:
    found: dict[str, list[float]] = {"ours": [], "pipeline": []}
    for _ in range(args.peak_repeats):
        for side, values in found.items():
            command = [sys.executable, __file__, "--peak", side, "--classifier", str(folder)]
            command += ["--pairs", str(args.pairs), "--data", str(args.data)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout.split("peak ")[1]))
    ratios = [a / b for a, b in zip(found["ours"], found["pipeline"], strict=True)]
    figures.add_repeats("peak_branch5_vs_one", ratios)
    for side, values in found.items():
        figures.add_repeats(f"peak_mib_{side}", values)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--prompts", type=int, default=2, help="of the groups")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=("ours", "pipeline"), help=argparse.SUPPRESS)
    parser.add_argument("--classifier", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dense, args.peak_repeats = 2, 3
    torch.set_num_threads(args.threads)
    if args.peak:
        peak(args.peak, args, args.classifier)
        return
    if args.quick:
        args.prompts, args.pairs, args.repeats, args.dense, args.peak_repeats = 1, 8, 1, 1, 1
    figures = Figures(args)
    backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
    with tempfile.TemporaryDirectory() as name:
        folder = make_classifier(backbone, Path(name) / "model")
        compare_groups(args, backbone, folder, figures)
        compare_weights(backbone, figures)
        figures.write()  # what there is, should the rest be cut
        compare_pairs(args, folder, figures)
        figures.write()
        compare_peaks(args, folder, figures)
    print(f"load: {os.getloadavg()[0]:.2f}")
    figures.write()


if __name__ == "__main__":
    main()
