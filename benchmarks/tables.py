"""The tables of measured figures in README.md and docs/measured.md, made from results/.

``python benchmarks/tables.py`` prints them; a test compares the documents with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

from benchmarks.shared.common import RESULTS, ROOT

TRUNKS = {"": "SmolLM2-135M", "_minilm": "MiniLM-L6"}
PARTS = ("harmless", "all", "tldr", "mtbench")
KINDS = {
    "peer": "logistic regression, last layer",
    "head": "five heads, one view",
    "views": "five heads, a view each",
    "budget_peer": "logistic regression, fewer pairs",
    "branch": "five branches, fewer pairs",
    "full": "five full models, fewer pairs",
}
HEADER = ("trunk", "pairs", "reward", "accuracy", "NLL", "ECE (chance)")
HEADER += ("accuracy gain", "NLL gain, nats", "pooling gain, nats")
# What is claimed, by topic: the claim, the result that holds it, its figure, how it is shown.
CLAIMS = {
    "Scoring": (
        (
            "five branches, 16 completions per prompt: speed over a loop of five models",
            "scoring",
            "group16_branch5_vs_loop",
            "{:.1f}×",
        ),
        ("five branches: speed over **one** model", "scoring", "group16_branch5_vs_one", "{:.1f}×"),
        (
            "five heads with a view each (the default): speed over a loop of five models",
            "scoring",
            "group16_default_vs_loop",
            "{:.1f}×",
        ),
        (
            "five heads with a view each: speed over **one** model",
            "scoring",
            "group16_views5_vs_one",
            "{:.1f}×",
        ),
        (
            "five LoRA members: speed over switching peft's adapters",
            "scoring",
            "group16_lora5_vs_switch",
            "{:.1f}×",
        ),
        (
            "one member on pairs: speed over transformers' pipeline",
            "scoring",
            "pairs_vs_pipeline",
            "{:.1f}×",
        ),
        (
            "real tokens per second without shared prompts, relative to dense forward passes",
            "scoring",
            "pairs_vs_limit",
            "{:.2f}",
        ),
        (
            "memory of five branches' weights, relative to the theoretical minimum 1 + (k − 1)·m·block/total",
            "scoring",
            "weights_branch5_vs_bound",
            "{:.2f}",
        ),
        (
            "peak memory with five branches, relative to the pipeline with one model",
            "scoring",
            "peak_branch5_vs_one",
            "{:.2f}",
        ),
        (
            "five heads, 1,000 to 100,000 short samples: slope of log time over log samples",
            "growth",
            "growth_exponent",
            "{:.2f}",
        ),
        (
            "peak memory above the imports, 100,000 samples relative to 1,000",
            "growth",
            "peak_ratio",
            "{:.2f}",
        ),
    ),
    "Against RewardUQ": (
        (
            "calibrated NLL, five heads on MiniLM-L6: ensemble_rm",
            "vs_rewarduq",
            "nll_ours",
            "{:.3f}",
        ),
        ("calibrated NLL: RewardUQ", "vs_rewarduq", "nll_rewarduq", "{:.3f}"),
        ("accuracy: ensemble_rm", "vs_rewarduq", "accuracy_ours", "{:.3f}"),
        ("accuracy: RewardUQ", "vs_rewarduq", "accuracy_rewarduq", "{:.3f}"),
        (
            "from texts to an evaluated ensemble: speed over RewardUQ",
            "vs_rewarduq",
            "wall_ratio",
            "{:.1f}×",
        ),
        ("scoring new texts: speed over RewardUQ", "vs_rewarduq", "score_ratio", "{:.2f}×"),
    ),
    "Calibration and judgments": (
        (
            "temperature fit of 100,000 judgments: speed over netcal",
            "calibration_fit",
            "netcal_ratio",
            "{:.1f}×",
        ),
        ("its NLL minus netcal's, nats", "calibration_fit", "nll_gap", "{:.0e}"),
        (
            "a million judgments checked and imported into SQLite, CPU seconds",
            "judgments",
            "import_cpu_seconds_1000000",
            "{:.0f}",
        ),
        (
            "peak memory of that import above the imports of packages, MiB",
            "judgments",
            "import_peak_mib_1000000",
            "{:.0f}",
        ),
        (
            "simulated years of recalibration: ECE against the truth, gated relative to refitting blindly",
            "recalibration",
            "gated_over_blind",
            "{:.2f}",
        ),
        (
            "the same with a month of corrupted votes",
            "recalibration",
            "gated_over_blind_corrupted",
            "{:.2f}",
        ),
        (
            "share of healthy years with a drift alarm, upper bound (promised: 0.05)",
            "recalibration",
            "healthy_years_alarmed_upper",
            "{:.4f}",
        ),
        ("months until an alarm after T doubles", "recalibration", "delay_months", "{:.0f}"),
        (
            "real votes that contradict the margins: gain of the gated job over a frozen T, nats",
            "real_votes",
            "gain_gated_contradicted",
            "{:.3f}",
        ),
        (
            "gold reward after four rounds of best-of-n, members frozen",
            "retraining",
            "gold_frozen",
            "{:.2f}",
        ),
        (
            "gold reward after four rounds, members retrained on the policy's judgments",
            "retraining",
            "gold_retrained",
            "{:.2f}",
        ),
        (
            "judgments chosen by disagreement for the same NLL, relative to random draws",
            "selection",
            "ratio_disagreement_all",
            "{:.2f}",
        ),
        (
            "20 % of the comparisons sent to a judge by epistemic uncertainty: share of the judge's gain",
            "routing",
            "recovered_epistemic_at_20_harmless",
            "{:.2f}",
        ),
    ),
    "Over-optimisation": (
        (
            "synthetic gold, 25 % of labels flipped: over-optimisation removed by five MLPs, UWO with λ = ½",
            "overoptimisation",
            "removed_noise_uwo_paper",
            "{:.2f}",
        ),
        ("by five MLPs, λ tuned on other seeds", "overoptimisation", "removed_noise_uwo", "{:.2f}"),
        ("by the mean of five MLPs", "overoptimisation", "removed_noise_mean", "{:.2f}"),
        (
            "by five heads on one layer of a shared network, UWO with λ = ½",
            "overoptimisation",
            "heads_removed_noise_uwo_paper",
            "{:.2f}",
        ),
        (
            "by five heads with a view each, UWO with λ = ½",
            "overoptimisation",
            "views_removed_noise_uwo_paper",
            "{:.2f}",
        ),
        (
            "real samples, 25 % of labels flipped: gold at best of 1,024 by one head on the last layer",
            "overoptimisation_lm",
            "gold_at_1024_single",
            "{:.2f}",
        ),
        (
            "gold at best of 1,024 by five such heads, UWO with λ = ½",
            "overoptimisation_lm",
            "gold_at_1024_heads_uwo",
            "{:.2f}",
        ),
        (
            "gold at best of 1,024 by five heads with a view each, UWO with λ = ½",
            "overoptimisation_lm",
            "gold_at_1024_views_uwo",
            "{:.2f}",
        ),
        (
            "gold at best of 1,024 by one head on their middle view",
            "overoptimisation_lm",
            "gold_at_1024_middle_one",
            "{:.2f}",
        ),
        (
            "gold at best of 1,024 by five branches, UWO with λ = ½",
            "overoptimisation_lm",
            "gold_at_1024_branch_uwo",
            "{:.2f}",
        ),
        (
            "gold at best of 1,024 by views of two backbones, UWO with λ = ½ (gold was trained from one of them)",
            "overoptimisation_lm",
            "gold_at_1024_mixed_uwo",
            "{:.2f}",
        ),
        (
            "GRPO with a KL penalty (β = .05, 40 steps, two seeds): final gold with one head",
            "grpo",
            "gold_final_single_beta0.05",
            "{:.2f}",
        ),
        (
            "GRPO with the penalty: final gold with the mean of five views",
            "grpo",
            "gold_final_views_mean_beta0.05",
            "{:.2f}",
        ),
        (
            "GRPO with the penalty: final gold with five views, UWO with λ = ½",
            "grpo",
            "gold_final_views_uwo_beta0.05",
            "{:.2f}",
        ),
        (
            "GRPO without a penalty: final gold with one head",
            "grpo",
            "gold_final_single_beta0",
            "{:.2f}",
        ),
        (
            "GRPO without a penalty: final gold with the mean of five views",
            "grpo",
            "gold_final_views_mean_beta0",
            "{:.2f}",
        ),
        (
            "GRPO without a penalty: final gold with five views, UWO with λ = ½",
            "grpo",
            "gold_final_views_uwo_beta0",
            "{:.2f}",
        ),
        (
            "best-of-n estimator, 12,600 samples and 1,000 prompts: speed over the plain loop",
            "bestofn",
            "loop_ratio",
            "{:.1f}×",
        ),
    ),
    "Serving": (
        (
            "64 clients, five branches: requests per second over **one** plain model",
            "serving",
            "throughput_vs_one",
            "{:.1f}×",
        ),
        (
            "requests per second over a loop of five models",
            "serving",
            "throughput_vs_loop",
            "{:.1f}×",
        ),
        (
            "p99 latency of the endpoint with one model, relative to ours",
            "serving",
            "p99_vs_one",
            "{:.1f}",
        ),
        (
            "share of the wall time at full load that is not scoring",
            "serving",
            "overhead_share",
            "{:.3f}",
        ),
        (
            "fifteen minutes with three kills, slow and leaving clients: answers lost",
            "serving",
            "soak_lost",
            "{:.0f}",
        ),
        ("the same: answers doubled or mixed up", "serving", "soak_doubled_or_mixed_up", "{:.0f}"),
        (
            "memory of its last minutes relative to the minutes before",
            "serving",
            "soak_memory_growth",
            "{:.2f}",
        ),
        (
            "five members on servers that take half a second: one after the other, relative to concurrently",
            "remote_members",
            "remote5_vs_turns",
            "{:.1f}×",
        ),
        (
            "the five concurrently, relative to one of them",
            "remote_members",
            "remote5_vs_one",
            "{:.2f}",
        ),
    ),
}
# The figures that README.md shows, good and bad; a claim may need two of them.
HEADLINES = (
    (
        "HH-RLHF harmless-base, SmolLM2-135M: NLL gain of five heads with a view each over a logistic regression on the last layer, nats",
        *("human_preferences", ("nll_gain_views_harmless",), "{:.3f}"),
    ),
    (
        "five such heads, 16 completions per prompt: scoring speed over **one** model",
        *("scoring", ("group16_views5_vs_one",), "{:.1f}×"),
    ),
    (
        "reward server, 64 clients, five branches: requests per second over **one** plain model",
        *("serving", ("throughput_vs_one",), "{:.1f}×"),
    ),
    (
        "simulated healthy years with a drift alarm, upper bound of the share (promised: 0.05)",
        *("recalibration", ("healthy_years_alarmed_upper",), "{:.4f}"),
    ),
    (
        "GRPO with a small KL penalty, noisy labels: final gold reward with the mean of five views; with one head",
        *("grpo", ("gold_final_views_mean_beta0.05", "gold_final_single_beta0.05"), "{:.2f}"),
    ),
    (
        "**negative**: GRPO without a penalty: with five views under UWO; with one head",
        *("grpo", ("gold_final_views_uwo_beta0", "gold_final_single_beta0"), "{:.2f}"),
    ),
)


def figures_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    figures: dict[str, dict[str, Any]] = result["figures"]
    return figures


def script_of(name: str) -> Path:
    """Return the path of the script that writes a result, from the repository's root."""
    (script,) = (ROOT / "benchmarks").glob(f"*/{name}.py")
    return script.relative_to(ROOT)


def gain(figures: dict[str, dict[str, Any]], name: str, digits: int) -> str:
    if name not in figures:
        return ""
    f = figures[name]
    return f"{f['median']:+.{digits}f} [{f['low']:+.{digits}f}, {f['high']:+.{digits}f}]"


def rows(figures: dict[str, dict[str, Any]], kinds: Collection[str]) -> list[list[str]]:
    found = []
    for suffix, trunk in TRUNKS.items():
        for part in PARTS:
            for kind in kinds:
                name = f"{kind}_{part}{suffix}"
                if f"nll_{name}" not in figures:
                    continue
                accuracy, nll, ece, null = (
                    figures[f"{figure}_{name}"]["median"]
                    for figure in ("accuracy", "nll", "ece", "ece_null95")
                )
                pooling = figures.get(f"pooling_gain_{name}", {}).get("median")
                found.append(
                    [
                        *(trunk, part, KINDS[kind], f"{accuracy:.3f}", f"{nll:.3f}"),
                        f"{ece:.3f} (≤ {null:.3f})",
                        gain(figures, f"accuracy_gain_{name}", 3),
                        gain(figures, f"nll_gain_{name}", 4),
                        "" if pooling is None else f"{pooling:.4f}",
                    ]
                )
    return found


def markdown(lines: list[list[str]]) -> str:
    """Return lines as a table, the first its head."""
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def preferences(kinds: Collection[str] = tuple(KINDS)) -> str:
    """Return the table of human preferences."""
    return markdown([list(HEADER), *rows(figures_of("human_preferences"), kinds)])


def kinds() -> str:
    """Return the table of what each kind of member costs, and what diversity it buys."""
    from benchmarks.quality import kinds as benchmark

    figures = figures_of("kinds")
    shown = {
        "correlation": ("correlation", 2),
        "AUROC of std": ("error_auroc_std", 2),
        "of −margin": ("error_auroc_margin", 2),
        "disagree": ("disagreement", 2),
        "on unlike texts": ("disagreement_unlike", 2),
        "training, CPU s": ("train_seconds", 0),
    }
    head = ["trunk", "members", "seeds", "cost", "accuracy", "NLL", "NLL gain", "pooling gain"]
    lines = [head + list(shown)]
    for backbone, label in (*benchmark.LABELS.items(), ("both", "both")):
        start = f"nll_{backbone}_"
        for name in [f.removeprefix(start) for f in figures if f.startswith(start)]:
            cost = benchmark.cost_of(name, backbone, figures)
            line = [label, name.replace("_", ", "), str(figures[start + name]["n"])]
            line.append("" if cost is None else f"{cost:.1f}")
            line += [
                f"{figures[f'{f}_{backbone}_{name}']['median']:.3f}" for f in ("accuracy", "nll")
            ]
            line.append("" if name == "head" else gain(figures, f"nll_gain_{backbone}_{name}", 3))
            for figure, digits in (("pooling_gain", 4), *shown.values()):
                found = figures.get(f"{figure}_{backbone}_{name}")
                line.append("" if found is None else f"{found['median']:.{digits}f}")
            lines.append(line)
    return markdown(lines)


def with_spread(figure: dict[str, Any], form: str) -> str:
    """Return a figure with its spread, if it has one."""
    middle, low, high = (form.format(figure[part]) for part in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def claims() -> str:
    """Return the tables of claims, one per topic, each figure with its spread."""
    tables = []
    for topic, rows_ in CLAIMS.items():
        lines = [["what", "measured", "command"]]
        for claim, script, name, form in rows_:
            figure = with_spread(figures_of(script)[name], form)
            lines.append([claim, figure, f"`python {script_of(script)}`"])
        tables.append(f"### {topic}\n\n{markdown(lines)}")
    return "\n\n".join(tables)


def headlines() -> str:
    """Return the few figures of README.md."""
    lines = [["what", "measured", "script"]]
    for claim, script, names, form in HEADLINES:
        figures = figures_of(script)
        measured = "; ".join(with_spread(figures[name], form) for name in names)
        path = script_of(script)
        lines.append([claim, measured, f"[{path.name}]({path})"])
    return markdown(lines)


if __name__ == "__main__":
    print(headlines(), claims(), preferences(), kinds(), sep="\n\n")
