"""Saved files have the modes that the umask gives to new ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ensemble_rm.file_modes import follow_umask
from ensemble_rm.members.learning.averaging import average_files
from ensemble_rm.members.learning.checkpoint import FILE, save_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_tree_follows_the_umask_and_links_out_of_it_are_left(tmp_path: Path, mask: int) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    outside.write_text("of the user")
    outside.chmod(0o600)
    (tree / "below").mkdir(parents=True, mode=0o700)
    (tree / "below/file").write_text("x")
    (tree / "below/file").chmod(0o755)
    (tree / "link").symlink_to(outside)
    follow_umask(tree)
    assert mode(tree) == mode(tree / "below") == 0o777 & ~mask
    assert mode(tree / "below/file") == 0o666 & ~mask
    assert mode(outside) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "tree"]


def test_checkpoints_and_averages_follow_it(tmp_path: Path, mask: int) -> None:
    save_checkpoint(tmp_path / "run", {"w": torch.zeros(2)}, {"recipe": "r"})
    save_file({"w": np.ones(2)}, tmp_path / "a.safetensors")
    average_files([tmp_path / "a.safetensors"] * 2, tmp_path / "mean.safetensors")
    assert mode(tmp_path / "run" / FILE) == mode(tmp_path / "mean.safetensors") == 0o666 & ~mask
