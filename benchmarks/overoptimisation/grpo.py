"""Over-optimisation in GRPO: one head, the mean and the conservative ensemble, on a real policy.

SmolLM2-135M-Instruct with LoRA under TRL's GRPOTrainer, bfloat16, a step of 2 prompts with 8
completions of at most 24 tokens each. Gold and proxies are those of `overoptimisation_lm.py`, noisy
labels: `single` is one head on the last layer and token, `views` five heads, each with a view of
its own of the same pass; UWO at λ = ½. The prompts of a seed, their order, the adapters' beginning
and each step's uniform numbers are the same in all arms; a seed has proxies of its own. No proxy
was trained on these prompts.

Gold is in standard deviations of a prompt's samples, proxies are in their normalised units, both as
gains over the policy of the beginning on the same prompts. `…_final` is the mean of the last tenth
of the steps, `gold_mean` that of all; `gold_drop` is the peak less the final gold, above 0 by the
noise of a tenth's mean alone; `gold_gain` the final gold less the single head's of the same seed
and β.

    python benchmarks/overoptimisation/grpo.py --json FILE            # trains what is missing
    python benchmarks/overoptimisation/grpo.py --json FILE --report   # of the runs that are there

Runs are in the order of β within a seed, so that a set that is cut is balanced. All is kept under
--work; a run that was cut, or is now to be longer, goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.overoptimisation.grpo_figures import Course, picture, report
from benchmarks.overoptimisation.grpo_runs import ARMS, Plan, Run, prompt_order, read_rows, run_one
from benchmarks.overoptimisation.lm_proxies import make_proxy, within_unit
from benchmarks.overoptimisation.lm_world import CACHE, DATA, requests
from benchmarks.overoptimisation.overoptimisation_lm import Study
from benchmarks.shared.common import RESULTS, Figures, make_parser
from benchmarks.shared.preference_runs import package_folder
from ensemble_rm import RewardEnsemble, Sample
from ensemble_rm.members.backbone.checkpoint import locate

BASE_COPIES = 16  # completions of a prompt before training


class World:
    """Gold, proxies, prompts and where runs are kept."""

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.plan, self.folder = plan, args.work
        self.study = Study(
            args.world, args.data, args.cache, quick=args.quick, seeds=0, branched=[]
        )

    @cached_property
    def policy(self) -> Path:
        return locate(package_folder("smollm2"), cache_dir=self.study.cache_dir).folder

    @cached_property
    def prompts(self) -> list[str]:
        """Requests that neither proxies were trained on nor best of n is measured on."""
        sizes = self.study.sizes
        return requests(self.study.data)[sizes.prompts + sizes.training :]

    def order(self, seed: int) -> list[str]:
        return prompt_order(self.prompts, self.study.world.policy.tokenizer, self.plan, seed)

    def proxy(self, arm: str, seed: int) -> RewardEnsemble:
        """Return an arm's ensemble, trained if it is missing."""
        kind, aggregator = ARMS[arm]
        study = self.study
        made = make_proxy(
            study.work / "proxies",
            kind,
            "noise",
            seed,
            samples=study.world.training(),
            gold=study.train_gold,
            labels=study.labels,
            cache_dir=study.cache_dir,
        )
        return made.with_aggregator(aggregator)

    def start(self, seed: int) -> dict[str, list[float]]:
        """Return each step's mean gold, and mean reward by arm, before any training."""
        file = self.folder / f"start-seed{seed}.json"
        said = json.loads(file.read_text()) if file.exists() else {"gold": []}
        if len(said["gold"]) < self.plan.steps:
            file.parent.mkdir(parents=True, exist_ok=True)
            said = self._measure_start(seed)
            file.write_text(json.dumps(said))
        return said

    def _measure_start(self, seed: int) -> dict[str, list[float]]:
        asked, policy, plan = self.order(seed), self.study.world.policy, self.plan
        samples = []
        for step in range(plan.steps):
            own = asked[step * plan.prompts : (step + 1) * plan.prompts]
            encoded = [policy.encode(prompt) for prompt in own]
            texts = policy.write(encoded, BASE_COPIES, plan.tokens, seed=(seed, 12, step))
            samples += [Sample(own[i // BASE_COPIES], text) for i, text in enumerate(texts)]
        rewards = {"gold": self.study.gold.score(samples).reward}
        members: dict[str, np.ndarray] = {}  # by kind: arms differ in the aggregator alone
        for arm, (kind, aggregator) in ARMS.items():
            if kind not in members:
                members[kind] = self.proxy(arm, seed).score(samples).members
            rewards[arm] = aggregator(members[kind])
        return {
            name: values.reshape(plan.steps, -1).mean(axis=1).tolist()
            for name, values in rewards.items()
        }

    def train(self, run: Run) -> None:
        run_one(
            run,
            self.plan,
            self.folder / run.name,
            policy=self.policy,
            prompts=self.prompts,
            proxy=self.proxy(run.arm, run.seed),
            gold=self.study.gold,
        )

    def courses(self, runs: Sequence[Run]) -> list[Course]:
        """Return the runs that have come to their end."""
        unit = within_unit(self.study.train_gold.reshape(-1, 2))
        found = []
        for run in runs:
            rows = read_rows(self.folder / run.name / "rows.jsonl")[: self.plan.steps]
            if len(rows) < self.plan.steps:
                print(f"{run.name}: {len(rows)} steps of {self.plan.steps}, left out", flush=True)
                continue
            start = self.start(run.seed)
            found.append(Course.of(run.arm, run.beta, run.seed, rows, start=start, unit=unit))
        return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the JSONL files")
    parser.add_argument("--cache", type=Path, default=CACHE, help="the policy's weights")
    parser.add_argument("--world", type=Path, help="of overoptimisation_lm.py: gold and proxies")
    parser.add_argument("--work", type=Path, help="of the runs")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(steps=args.steps)
    if args.quick:
        plan = Plan(steps=2, prompts=2, copies=4, tokens=8, kl_every=1)
        args.betas, args.seeds = args.betas[-1:], 1
    args.world = args.world or args.cache / ("lm_world/quick" if args.quick else "lm_world")
    args.work = args.work or args.cache / ("grpo/quick" if args.quick else "grpo")
    figures = Figures(args)
    world = World(args, plan)
    runs = [
        Run(arm, beta, seed) for seed in range(args.seeds) for beta in args.betas for arm in ARMS
    ]
    for run in [] if args.report else runs:
        print(f"{run.name}", flush=True)
        world.train(run)
    courses = world.courses(runs)
    if not courses:
        raise SystemExit("no run has come to its end yet")
    report(figures, courses)
    if not args.quick:
        picture(courses, RESULTS / "grpo.png")
    figures.write()


if __name__ == "__main__":
    main()
