"""How much over-optimisation an ensemble prevents, with real models.

SmolLM2-135M-Instruct writes 2,048 completions of 24 tokens for each of 24 prompts; gold is a whole
MiniLM model fine-tuned on hh_rlhf, in standard deviations of a prompt's samples. Proxies learn from
400 pairs of the policy's samples for other prompts, 100 more for validation, labelled by gold
through Bradley–Terry, clean or with 25 % flipped; three seeds, each with pairs of its own. Best of
n by the unbiased estimator, n from 1 to 2,048.

Arms: `single`, one head on SmolLM2's last layer and token; `heads`, five of these, each on a
bootstrap of the pairs; `views`, five views of one pass, the library's default; `branch`, five
copies of the last two blocks; `mixed`, views of SmolLM2 and of frozen MiniLM, from which gold
began. What diversity adds to better layers is told by `middle_one`, one head on the middle one of
the views, and `middle`, five of these on bootstraps. Aggregators: mean, minimum, UWO (λ = ½) and
LCB (κ = 1), the papers' own; `…_single` is the average of the members' own curves, `uwo_centred`
takes the members' means over a prompt's samples out beforehand.

Names without `clean_` are the noisy case. `gain_at_1024_ARM` is against `single`, paired,
`gain_at_1024_ARM_over_OTHER` against another. Brackets are a bootstrap's over prompts and seeds.
All that is long is kept under --work; a run that was cut goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.overoptimisation.curve_figures import Curves, Interval
from benchmarks.overoptimisation.lm_arms import correlations, curves
from benchmarks.overoptimisation.lm_gold import make_gold
from benchmarks.overoptimisation.lm_picture import picture
from benchmarks.overoptimisation.lm_proxies import CASES, Labels, make_proxy
from benchmarks.overoptimisation.lm_scores import HeadReader, apart, together, write
from benchmarks.overoptimisation.lm_world import CACHE, DATA, QUICK, Sizes, World
from benchmarks.shared.common import ROOT, Figures, make_parser
from ensemble_rm import RewardEnsemble

HEADS = {"smollm2": ("single", "heads", "views", "middle_one", "middle"), "minilm": ("minilm",)}
AT = 1024
CONTRASTS = (
    ("views_uwo", "heads_uwo"),
    ("views_uwo", "views_mean"),
    ("views_uwo", "views_single"),
    ("views_uwo", "middle_one"),
    ("views_uwo", "middle_uwo"),
    ("mixed_uwo", "views_uwo"),
)


class Study:
    """Gold, proxies, samples and their scores, in one folder.

    Parameters
    ----------
    work, data, cache_dir : Path
    quick : bool
    seeds : int
    branches : dict
        The cases in which branches are trained, by how many seeds.
    """

    def __init__(
        self,
        work: Path,
        data: Path,
        cache_dir: Path,
        *,
        quick: bool,
        seeds: int,
        branched: list[str],
    ) -> None:
        self.work, self.data, self.cache_dir, self.quick = work, data, cache_dir, quick
        self.seeds, self.branched = seeds, branched
        self.sizes = QUICK if quick else Sizes()
        self.labels = Labels(20, 10) if quick else Labels()
        self.world = World(work, data, self.sizes, cache_dir)

    @cached_property
    def gold(self) -> RewardEnsemble:
        return make_gold(self.work / "gold", self.data, pairs=60 if self.quick else None)

    @cached_property
    def train_gold(self) -> np.ndarray:
        file = self.work / "training-gold.npy"
        if not file.exists():
            write(file, self.gold.score(self.world.training()).reward)
        return np.load(file)

    def proxies(self, kinds: tuple[str, ...], cases: list[str]) -> dict[str, RewardEnsemble]:
        """Return ensembles by KIND-CASE-seedN, trained where they are missing."""
        found = {}
        for seed in range(self.seeds):
            for case in cases:
                for kind in kinds:
                    found[f"{kind}-{case}-seed{seed}"] = make_proxy(
                        self.work / "proxies",
                        kind,
                        case,
                        seed,
                        samples=self.world.training(),
                        gold=self.train_gold,
                        labels=self.labels,
                        cache_dir=self.cache_dir,
                    )
        return found

    def prompt_gold(self, i: int) -> np.ndarray:
        file = self.work / f"scores/gold-{i:03d}.npy"
        if not file.exists():
            write(file, self.gold.score(self.world.samples(i)).reward)
        return np.load(file)

    @cached_property
    def readers(self) -> dict[str, HeadReader]:
        cases = list(CASES)
        return {trunk: HeadReader(self.proxies(kinds, cases)) for trunk, kinds in HEADS.items()}

    @cached_property
    def branches(self) -> dict[str, RewardEnsemble]:
        return self.proxies(("branch",), self.branched)

    @cached_property
    def branch_scorer(self) -> Any:
        return together(self.branches)

    def members(self, i: int) -> dict[str, np.ndarray]:
        """Return normalised scores of prompt `i`'s samples, by KIND-CASE-seedN."""
        found: dict[str, np.ndarray] = {}
        for trunk, reader in self.readers.items():
            file = self.work / f"features/{trunk}-{i:03d}.npy"
            found |= reader.score(self.world.samples(i), file)
        if self.branched:
            file = self.work / f"scores/branch-{'-'.join(self.branched)}-{i:03d}.npy"
            if not file.exists():
                write(file, self.branch_scorer.score(self.world.samples(i)))
            found |= apart(np.load(file), self.branches)
        return found

    def measure(self, sizes: list[int]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """Return by case each arm's gold, (n_prompts·n_seeds, n_sizes), and its correlations."""
        rows: dict[str, dict[str, list[np.ndarray]]] = {case: {} for case in CASES}
        found: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
        for i in range(self.sizes.prompts):
            members, gold = self.members(i), self.prompt_gold(i)
            print(f"prompt {i}: scored", flush=True)
            for case in CASES:
                for seed in range(self.seeds):
                    end = f"-{case}-seed{seed}"
                    own = {k[: -len(end)]: v for k, v in members.items() if k.endswith(end)}
                    for arm, curve in curves(own, gold, sizes).items():
                        rows[case].setdefault(arm, []).append(curve)
                    for arm, value in correlations(own, gold).items():
                        found[case].setdefault(arm, []).append(value)
        return {
            case: {arm: np.array(golds) for arm, golds in arms.items()}
            for case, arms in rows.items()
        }, found


def report(figures: Figures, case: str, gold: Curves, sizes: list[int], at: int) -> None:
    prefix, place = "" if case == "noise" else "clean_", sizes.index(at)

    def add(name: str, found: Interval | None, *, of_case: bool = True) -> None:
        if found is not None:
            whole = prefix * of_case + name
            figures.add(
                whole,
                found.value,
                found.low,
                found.high,
                gold.repeats,
                interval="95 % bootstrap over prompts and seeds",
            )

    for arm in gold.gold:
        add(f"gold_at_{at}_{arm}", gold.at(arm, place))
        add(f"peak_{arm}", gold.peak(arm))
        add(f"final_{arm}", gold.final(arm))
        add(f"drop_{arm}", gold.drop(arm))
        if arm not in ("single", "oracle"):
            add(f"gain_at_{at}_{arm}", gold.gain_at(arm, "single", place))
            add(f"removed_{case}_{arm}", gold.removed(arm, "single"), of_case=False)
    for arm, other in CONTRASTS:
        add(f"gain_at_{at}_{arm}_over_{other}", gold.gain_at(arm, other, place))


def add_correlations(figures: Figures, case: str, found: Mapping[str, list[float]]) -> None:
    for arm, values in found.items():
        if not arm.endswith("_centred"):
            name = f"{'' if case == 'noise' else 'clean_'}correlation_{arm}"
            low, high = np.quantile(values, [0.25, 0.75])
            figures.add(
                name,
                float(np.mean(values)),
                low,
                high,
                len(values),
                interval="quartiles over prompts and seeds",
            )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--work", type=Path, default=CACHE / "lm_world")
    parser.add_argument("--cache-dir", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--branched", nargs="*", choices=list(CASES), default=["noise"], help="cases with branches"
    )
    parser.add_argument("--proxies-only", action="store_true", help="stop when all are trained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(
        args.work / "quick" if args.quick else args.work,
        args.data,
        args.cache_dir,
        quick=args.quick,
        seeds=1 if args.quick else args.seeds,
        branched=args.branched,
    )
    heads = sum(len(reader.ensembles) for reader in study.readers.values())
    print(f"{heads} ensembles of heads, {len(study.branches)} of branches", flush=True)
    if args.proxies_only:
        return
    figures = Figures(args)
    sizes = [2**i for i in range(study.sizes.completions.bit_length())]
    found, related = study.measure(sizes)
    grid = (study.sizes.prompts, study.seeds)
    measured = {case: Curves(rows, grid=grid) for case, rows in found.items()}
    for case in ("noise", "clean"):
        report(figures, case, measured[case], sizes, min(AT, sizes[-2]))
        add_correlations(figures, case, related[case])
    figures.write()
    if not args.quick:
        picture(measured, sizes, ROOT / "docs/images/overoptimisation_lm.png")


if __name__ == "__main__":
    main()
