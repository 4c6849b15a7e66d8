"""The token budget: found from shapes and devices, kept in files, of no consequence to scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ensemble_rm import Sample, TrunkOptions
from ensemble_rm.errors import OptionError
from ensemble_rm.members import HeadScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.forward.batching import (
    CPU_BYTES,
    CUDA_CAP,
    LEAST,
    MPS_TOKENS,
    pick_token_budget,
)

SAMPLES = [Sample("Who are you?", "A fox " * n) for n in (1, 9, 3, 12, 2, 7)]
CPU = torch.device("cpu")


def found(model: torch.nn.Module, device: torch.device = CPU, **options: Any) -> int:
    given = {"width": 64, "depth": 2, "device": device} | options
    return pick_token_budget(None, model, **given)


@given(st.integers(64, 40_000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_on_a_cpu_the_widest_tensor_of_a_pass_stays_in_bounds(
    widest: int, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        vocabulary = torch.nn.Embedding(100_000, 64)
        model = torch.nn.Sequential(vocabulary, torch.nn.Linear(64, widest)).to(dtype)
    budget = found(model)
    row = max(widest * dtype.itemsize, 64 * 4)
    assert budget == 2 ** int(np.log2(budget))
    assert budget * row <= CPU_BYTES or budget == LEAST
    assert 2 * budget * row > CPU_BYTES


def test_on_cuda_it_follows_the_free_memory_up_to_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(64, 256)
    budgets = []
    for free in (0, 2**24, 2**28, 2**30, 2**60):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 2**60))
        budgets.append(found(model, torch.device("cuda")))
        assert budgets[-1] == found(model, torch.device("cuda"))
        assert budgets[-1] * 256 * 4 <= free or budgets[-1] == LEAST
    assert budgets[0] == LEAST and budgets[-1] == CUDA_CAP
    assert budgets == sorted(budgets) and len(set(budgets)) > 2
    assert found(model, torch.device("mps")) == MPS_TOKENS


def test_what_the_user_says_holds() -> None:
    assert pick_token_budget(77, width=8, depth=1, device=CPU) == 77
    with pytest.raises(OptionError, match="at least 1, not 0"):
        pick_token_budget(0, width=8, depth=1, device=CPU)


def test_scores_do_not_depend_on_it_and_files_keep_what_was_said(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    scores = []
    for asked in (None, 64, 8192):
        scorer = two_heads(token_budget=asked)
        folder = tmp_path / str(asked)
        scorer.save(folder)
        assert json.loads((folder / "member.json").read_text())["options"]["token_budget"] == asked
        again = HeadScorer.load(folder, device="cpu")
        assert again.options.token_budget == asked and again.digest == two_heads().digest
        assert (again.trunk.token_budget == asked) == (asked is not None)
        scores.append(again.score(SAMPLES))
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0], other, atol=1e-4 * scores[0].std())


def test_a_trunk_without_its_upper_blocks_has_the_budget_of_the_whole(small_folder: Path) -> None:
    options = TrunkOptions(device="cpu")
    budgets = {Trunk(locate(small_folder), options, top=top).token_budget for top in (0, 2, None)}
    assert len(budgets) == 1
