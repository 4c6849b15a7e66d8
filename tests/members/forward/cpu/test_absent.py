"""What is for CPUs alone is not even imported elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ensemble_rm.members.forward.prefix_cache import splits_attention

LOADED = """
import sys
import ensemble_rm.members.backbone.trunk
import ensemble_rm.members.branches.scorer
import ensemble_rm.members.full.scorer
import ensemble_rm.members.heads.scorer
import ensemble_rm.members.implicit
import ensemble_rm.members.lora.scorer
print([name for name in sys.modules if name.startswith("ensemble_rm.members.forward.cpu")])
"""


def test_no_member_imports_it_before_a_model_is_on_a_cpu() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
def test_attention_is_never_split_elsewhere(device: str) -> None:
    assert splits_attention(None, torch.device(device)) is False
