"""The README's table of human preferences, from the figures that `human_preferences.py` wrote.

``python benchmarks/tables.py`` prints it; a test holds the README against it.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "human_preferences.json"
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


def gain(figures: dict[str, dict[str, float]], name: str, digits: int) -> str:
    if name not in figures:
        return ""
    f = figures[name]
    return f"{f['median']:+.{digits}f} [{f['low']:+.{digits}f}, {f['high']:+.{digits}f}]"


def rows(figures: dict[str, dict[str, float]]) -> list[list[str]]:
    found = []
    for suffix, trunk in TRUNKS.items():
        for part in PARTS:
            for kind, shown in KINDS.items():
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
                        *(trunk, part, shown, f"{accuracy:.3f}", f"{nll:.3f}"),
                        f"{ece:.3f} (≤ {null:.3f})",
                        gain(figures, f"accuracy_gain_{name}", 3),
                        gain(figures, f"nll_gain_{name}", 4),
                        "" if pooling is None else f"{pooling:.4f}",
                    ]
                )
    return found


def table(figures: dict[str, dict[str, float]]) -> str:
    lines = [list(HEADER), ["---"] * len(HEADER), *rows(figures)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["figures"]))
