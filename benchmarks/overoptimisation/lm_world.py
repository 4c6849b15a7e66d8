"""What SmolLM2-135M-Instruct writes: the samples of `overoptimisation_lm.py`.

Prompts are short first requests of hh_rlhf's helpful dialogues. Some get thousands of completions,
on which best of n is measured; others get two, on which proxies are trained. Temperature 1 over
the whole vocabulary, at most TOKENS new tokens: most completions are cut there. Each prompt's
samples are kept in a file of their own, so that a run that was cut goes on.

    python benchmarks/overoptimisation/lm_world.py --data DATA     # makes what is missing
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.overoptimisation.lm_sampling import Sampler
from benchmarks.shared.common import SHARED_DATA, make_parser
from benchmarks.shared.preference_runs import package_folder
from ensemble_rm import Sample, load_preferences
from ensemble_rm.members.backbone.checkpoint import locate

CACHE = Path("~/.cache/ensemble_rm").expanduser()
DATA = SHARED_DATA
SEED, WORDS, LETTERS = 0, 14, 15  # a prompt's most words, and least letters
AT_ONCE = 1024  # completions


@dataclass(frozen=True)
class Sizes:
    """How much is sampled.

    Attributes
    ----------
    prompts, completions : int
        Those that best of n is measured on, and completions of each.
    training : int
        Other prompts, of two completions each.
    tokens : int
        Most new tokens of a completion.
    """

    prompts: int = 24
    completions: int = 2048
    training: int = 1500
    tokens: int = 24


QUICK = Sizes(prompts=2, completions=64, training=30, tokens=8)


def requests(data: Path) -> list[str]:
    """Return the short first requests of the helpful dialogues, each once, in a seeded order."""
    found = []
    for pair in load_preferences(data / "hh_rlhf.jsonl"):
        first = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0].content
        text = first.strip()
        short = len(text) >= LETTERS and len(text.split()) <= WORDS
        if short and (pair.subset or "").startswith("helpful"):
            found.append(text)
    every = list(dict.fromkeys(found))
    return [every[i] for i in np.random.default_rng(SEED).permutation(len(every))]


class Policy:
    """The policy and its tokenizer."""

    def __init__(self, cache_dir: Path) -> None:
        folder = locate(package_folder("smollm2"), cache_dir=cache_dir).folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.sampler = Sampler(model, eos=self.tokenizer.eos_token_id)

    def encode(self, prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def write(
        self, prompts: Sequence[list[int]], copies: int, tokens: int, *, seed: Sequence[int]
    ) -> list[str]:
        """Return completions of prompts of one length, a prompt's together."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        )
        written = self.sampler.sample(
            torch.tensor(prompts), copies=copies, tokens=tokens, generator=generator
        )
        rows = [row[row >= 0] for row in written]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))


@dataclass(frozen=True)
class World:
    """The samples, in a folder.

    Attributes
    ----------
    folder, data, cache_dir : Path
        Of the samples; of hh_rlhf.jsonl; of the policy's weights.
    sizes : Sizes
    """

    folder: Path
    data: Path
    sizes: Sizes = Sizes()
    cache_dir: Path = CACHE

    @cached_property
    def dealt(self) -> tuple[list[str], list[str]]:
        """The prompts of best of n, and those of training."""
        every, n = requests(self.data), self.sizes.prompts
        return every[:n], every[n : n + self.sizes.training]

    @cached_property
    def policy(self) -> Policy:
        return Policy(self.cache_dir)

    def training(self) -> list[Sample]:
        """Return two samples of each training prompt, side by side; they are made if missing."""
        file = self.folder / "training.json"
        if not file.exists():
            _write(file, dict(self._train_texts()))
        texts = json.loads(file.read_text())
        return [Sample(prompt, text) for prompt in self.dealt[1] for text in texts[prompt]]

    def _train_texts(self) -> Iterator[tuple[str, list[str]]]:
        by_length: dict[int, list[str]] = {}
        for prompt in self.dealt[1]:
            by_length.setdefault(len(self.policy.encode(prompt)), []).append(prompt)
        for length, prompts in sorted(by_length.items()):
            encoded = [self.policy.encode(prompt) for prompt in prompts]
            texts = self.policy.write(encoded, 2, self.sizes.tokens, seed=(SEED, 1, length))
            yield from ((p, texts[2 * i : 2 * i + 2]) for i, p in enumerate(prompts))

    def samples(self, i: int) -> list[Sample]:
        """Return every sample of prompt `i`; they are made if missing."""
        file = self.folder / f"samples-{i:03d}.json"
        prompt = self.dealt[0][i]
        if not file.exists():
            texts: list[str] = []
            while len(texts) < self.sizes.completions:
                copies = min(AT_ONCE, self.sizes.completions - len(texts))
                seed = (SEED, 2, i, len(texts))
                encoded = [self.policy.encode(prompt)]
                texts += self.policy.write(encoded, copies, self.sizes.tokens, seed=seed)
            _write(file, {"prompt": prompt, "texts": texts})
        said = json.loads(file.read_text())
        assert said["prompt"] == prompt, f"{file} is of other data: delete it"
        return [Sample(prompt, text) for text in said["texts"]]


def _write(file: Path, said: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(said))
    scratch.replace(file)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--work", type=Path, default=CACHE / "lm_world")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = (
        World(args.work / "quick", args.data, QUICK) if args.quick else World(args.work, args.data)
    )
    print(f"{len(world.training())} samples to train on", flush=True)
    for i in range(world.sizes.prompts):
        print(f"{i}: {len(world.samples(i))} samples of {world.dealt[0][i]!r}", flush=True)


if __name__ == "__main__":
    main()
