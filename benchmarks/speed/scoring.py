"""Scoring with five members against today's practice, SmolLM2-135M in bfloat16, one thread.

Both sides run in turn, warm, tokenisation included, under the same dtype, threads and maximum
length. Workloads: `group16`, prompts of about 200 tokens with 16 completions of at most 64 each;
`pairs`, chosen and rejected of hh_rlhf.jsonl in order of arrival. Without that file, texts are
random words. Peers: `one` Hugging Face model, batches of 16 padded in order of arrival; the `loop`
over five of them; a `switch` of five peft adapters on one; transformers' text-classification
`pipeline` at batch 32; and the `limit`, the backbone's forward pass on dense batches without
padding, in tokens a second, against our real tokens a second without prefix sharing.

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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import SHARED_DATA, Figures, make_parser, resident, seconds
from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import (
    HuggingFace,
    K,
    Switched,
    adapters,
    branches,
    groups,
    heads,
    make_classifier,
    pairs_in_order,
    pipeline,
)
from ensemble_rm import TrunkOptions
from ensemble_rm.members import FullScorer
from ensemble_rm.members.backbone.checkpoint import Backbone, load_tokenizer, locate
from ensemble_rm.members.backbone.trunk import Trunk

DATA = SHARED_DATA / "hh_rlhf.jsonl"


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
    options = TrunkOptions(max_length=args.max_length, dtype="bfloat16", device="cpu")
    smaller: dict[str, Any] = {}
    if args.quick:
        smaller = {"completions": 4, "completion_tokens": 16, "prompt_tokens": (40, 70)}
    samples = groups(args, load_tokenizer(backbone.folder), **smaller)
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
    options = TrunkOptions(max_length=args.max_length, dtype="bfloat16", device="cpu")
    samples = pairs_in_order(args)
    scorer = FullScorer.from_name(folder, options)
    alone = scorer.with_options(replace(options, share_prefix=False))
    texts = HuggingFace(folder, options, 0).texts(samples)
    pipe = pipeline(folder, options)
    encoder, model = alone._open()
    tokens = sum(len(e.ids) for e in encoder.encode(samples))
    ids = torch.randint(100, 40000, (32, args.max_length // 2))

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
    figures.add_value("weights_branch5_vs_bound", ratio)


def peak(side: str, args: argparse.Namespace, folder: Path) -> None:
    """Print this process's peak memory above its imports, in MiB."""
    import transformers.pipelines  # noqa: F401

    began = resident("VmHWM")
    options = TrunkOptions(max_length=args.max_length, dtype="bfloat16", device="cpu")
    samples = pairs_in_order(args)
    if side == "ours":
        backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
        branches(backbone, options, 2).score(samples)
    else:
        pipeline(folder, options)(HuggingFace(folder, options, 0).texts(samples))
    print(f"peak {resident('VmHWM') - began}")


def compare_peaks(args: argparse.Namespace, folder: Path, figures: Figures) -> None:
    found: dict[str, list[float]] = {"ours": [], "pipeline": []}
    for _ in range(args.peak_repeats):
        for side, values in found.items():
            command = [sys.executable, __file__, "--peak", side, "--classifier", str(folder)]
            command += ["--pairs", str(args.pairs), "--data", str(args.data)]
            command += ["--quick"] if args.quick else []
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
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=("ours", "pipeline"), help=argparse.SUPPRESS)
    parser.add_argument("--classifier", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dense, args.peak_repeats, args.max_length = 2, 3, 512
    torch.set_num_threads(args.threads)
    if args.quick:
        args.prompts, args.pairs, args.repeats, args.dense, args.peak_repeats = 1, 4, 1, 1, 1
        args.max_length = 128
    if args.peak:
        peak(args.peak, args, args.classifier)
        return
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
