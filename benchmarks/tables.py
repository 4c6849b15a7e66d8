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
# What is claimed, the script, its figure, and how the figure is shown.
CLAIMS = (
    (
        "five branches, 16 completions a prompt, against a loop of five models: times as fast",
        *("scoring", "group16_branch5_vs_loop", "{:.1f}"),
    ),
    ("the same against **one** model", "scoring", "group16_branch5_vs_one", "{:.1f}"),
    (
        "five heads with a view each, the default, against the loop",
        *("scoring", "group16_default_vs_loop", "{:.1f}"),
    ),
    ("the same against **one** model", "scoring", "group16_views5_vs_one", "{:.1f}"),
    (
        "five LoRA members against peft's adapters, switched",
        *("scoring", "group16_lora5_vs_switch", "{:.1f}"),
    ),
    (
        "one member on pairs against transformers' pipeline",
        *("scoring", "pairs_vs_pipeline", "{:.1f}"),
    ),
    (
        "real tokens a second over those of dense forward passes, prompts not shared",
        *("scoring", "pairs_vs_limit", "{:.2f}"),
    ),
    (
        "weights of five branches, of the bound 1 + (k − 1)·m·block/total",
        *("scoring", "weights_branch5_vs_bound", "{:.2f}"),
    ),
    (
        "peak memory of scoring with five branches, of the pipeline's with one model",
        *("scoring", "peak_branch5_vs_one", "{:.2f}"),
    ),
    (
        "five heads, 1,000 to 100,000 short samples: slope of log time on log samples",
        *("growth", "growth_exponent", "{:.2f}"),
    ),
    (
        "peak memory above the imports at 100,000 samples, of that at 1,000",
        *("growth", "peak_ratio", "{:.2f}"),
    ),
    (
        "five heads and RewardUQ's on MiniLM-L6: calibrated NLL of ours",
        *("vs_rewarduq", "nll_ours", "{:.3f}"),
    ),
    ("of theirs", "vs_rewarduq", "nll_rewarduq", "{:.3f}"),
    ("accuracy of ours", "vs_rewarduq", "accuracy_ours", "{:.3f}"),
    ("of theirs", "vs_rewarduq", "accuracy_rewarduq", "{:.3f}"),
    ("texts to evaluated ensemble, their time over ours", "vs_rewarduq", "wall_ratio", "{:.1f}"),
    ("new texts scored, their time over ours", "vs_rewarduq", "score_ratio", "{:.2f}"),
    (
        "temperature fit of 100,000 judgments, netcal's time over ours",
        *("calibration_fit", "netcal_ratio", "{:.1f}"),
    ),
    ("its NLL less netcal's, nats", "calibration_fit", "nll_gap", "{:.0e}"),
    (
        "a million judgments checked and imported into SQLite, processor seconds",
        *("judgments", "import_cpu_seconds_1000000", "{:.0f}"),
    ),
    (
        "peak memory above the imports, MiB",
        *("judgments", "import_peak_mib_1000000", "{:.0f}"),
    ),
    (
        "simulated years of recalibration: ECE against the truth, gated over blind refits",
        *("recalibration", "gated_over_blind", "{:.2f}"),
    ),
    ("with a month of corrupted votes", "recalibration", "gated_over_blind_corrupted", "{:.2f}"),
    (
        "healthy years with a drift alarm, upper bound; 0.05 is promised",
        *("recalibration", "healthy_years_alarmed_upper", "{:.4f}"),
    ),
    ("months until a doubled T is alarmed", "recalibration", "delay_months", "{:.0f}"),
    (
        "gold after four rounds of best-of-n against the reward: frozen",
        *("retraining", "gold_frozen", "{:.2f}"),
    ),
    ("retrained on the policy's judgments", "retraining", "gold_retrained", "{:.2f}"),
    (
        "judgments that disagreement needs, of random draws', to the same NLL",
        *("selection", "ratio_disagreement_all", "{:.2f}"),
    ),
    (
        "real votes that contradict the margins: gain of the gated job over a frozen T, nats",
        *("real_votes", "gain_gated_contradicted", "{:.3f}"),
    ),
    (
        "synthetic gold, 25 % of labels flipped: over-optimisation removed by five MLPs, UWO at ½",
        *("overoptimisation", "removed_noise_uwo_paper", "{:.2f}"),
    ),
    ("by the MLPs, λ tuned on other seeds", "overoptimisation", "removed_noise_uwo", "{:.2f}"),
    ("by the MLPs' mean", "overoptimisation", "removed_noise_mean", "{:.2f}"),
    (
        "by five heads on one layer of a shared network, UWO at ½",
        *("overoptimisation", "heads_removed_noise_uwo_paper", "{:.2f}"),
    ),
    (
        "by five heads with a view each, UWO at ½",
        *("overoptimisation", "views_removed_noise_uwo_paper", "{:.2f}"),
    ),
    (
        "real samples, 25 % of labels flipped: gold at n = 1,024 by one head on the last layer",
        *("overoptimisation_lm", "gold_at_1024_single", "{:.2f}"),
    ),
    (
        "by five such heads, UWO at ½",
        *("overoptimisation_lm", "gold_at_1024_heads_uwo", "{:.2f}"),
    ),
    (
        "by five heads with a view each, UWO at ½",
        *("overoptimisation_lm", "gold_at_1024_views_uwo", "{:.2f}"),
    ),
    (
        "by one head on their middle view",
        "overoptimisation_lm",
        "gold_at_1024_middle_one",
        "{:.2f}",
    ),
    ("by five branches, UWO at ½", "overoptimisation_lm", "gold_at_1024_branch_uwo", "{:.2f}"),
    (
        "by views of two backbones, UWO at ½; gold began from one of them",
        *("overoptimisation_lm", "gold_at_1024_mixed_uwo", "{:.2f}"),
    ),
    (
        "GRPO on a real policy, β = .05, 40 steps, two seeds: gold at the end with one head",
        *("grpo", "gold_final_single_beta0.05", "{:.2f}"),
    ),
    ("with the mean of five views", "grpo", "gold_final_views_mean_beta0.05", "{:.2f}"),
    ("with five views, UWO at ½", "grpo", "gold_final_views_uwo_beta0.05", "{:.2f}"),
    (
        "the same without a penalty: with one head",
        *("grpo", "gold_final_single_beta0", "{:.2f}"),
    ),
    ("with the mean of five views", "grpo", "gold_final_views_mean_beta0", "{:.2f}"),
    ("with five views, UWO at ½", "grpo", "gold_final_views_uwo_beta0", "{:.2f}"),
    (
        "comparisons sent to a judge: 20 % of them by epistemic uncertainty, share of its gain had",
        *("routing", "recovered_epistemic_at_20_harmless", "{:.2f}"),
    ),
    (
        "served to 64 clients: five branches, times the requests a second of **one** plain model",
        *("serving", "throughput_vs_one", "{:.1f}"),
    ),
    ("of a loop of five", "serving", "throughput_vs_loop", "{:.1f}"),
    ("p99 latency of the endpoint with one model, over ours", "serving", "p99_vs_one", "{:.1f}"),
    (
        "server and wire, of the wall time at full load",
        *("serving", "overhead_share", "{:.3f}"),
    ),
    (
        "fifteen minutes with three kills, slow clients and some that leave: answers lost",
        *("serving", "soak_lost", "{:.0f}"),
    ),
    ("doubled or mixed up", "serving", "soak_doubled_or_mixed_up", "{:.0f}"),
    (
        "memory of its last minutes over that of those before",
        *("serving", "soak_memory_growth", "{:.2f}"),
    ),
    (
        "five members on servers that take half a second: one after the other, over all at once",
        *("remote_members", "remote5_vs_turns", "{:.1f}"),
    ),
    ("all at once, over one of them alone", "remote_members", "remote5_vs_one", "{:.2f}"),
    (
        "best-of-n estimator, 12,600 samples and 1,000 prompts: the plain loop's time over ours",
        *("bestofn", "loop_ratio", "{:.1f}"),
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
    """Return the table of human preferences; the kind stands in it where there are several."""
    lines = [list(HEADER), *rows(figures_of("human_preferences"), kinds)]
    if len(kinds) == 1:
        lines = [line[:2] + line[3:] for line in lines]
    return markdown(lines)


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


def claims() -> str:
    """Return the table of claims, each with its figure and its spread."""
    lines, before = [["claim", "measured", "command"]], ""
    for claim, script, name, shown in CLAIMS:
        f = figures_of(script)[name]
        middle, low, high = (shown.format(f[part]) for part in ("median", "low", "high"))
        spread = "" if low == high else f" ({low} to {high})"
        command = f"`python {script_of(script)}`" if script != before else "the same"
        lines.append([claim, middle + spread, command])
        before = script
    return markdown(lines)


if __name__ == "__main__":
    print(preferences(["views"]), preferences(), claims(), kinds(), sep="\n\n")
