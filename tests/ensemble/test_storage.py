"""An ensemble's directory: replaced as a whole or not at all, and what is wrong in it said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ensemble_rm import RewardEnsemble
from ensemble_rm.aggregation import mean, minimum
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import StorageError
from ensemble_rm.members import HeadScorer
from tests.support.saved_files import record_digests


@pytest.fixture
def ensemble(two_heads: Callable[..., HeadScorer]) -> RewardEnsemble:
    return RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())


def test_a_save_that_fails_leaves_the_old_ensemble(
    ensemble: RewardEnsemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensemble.save_pretrained(tmp_path / "run")
    before = (folder / "ensemble.json").read_text()
    rename, renamed = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == 2:  # the old one has gone aside
            raise OSError("no room")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no room"):
        ensemble.with_aggregator(minimum()).save_pretrained(folder)
    monkeypatch.undo()
    assert (folder / "ensemble.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "reads format 1"),
        ({"members": [{"kind": "tree", "folder": "members/0"}]}, "no kind of member 'tree'"),
        ({"members": [{}]}, r"members\.0\.kind: missing"),
    ],
)
def test_what_cannot_be_read_is_said(
    ensemble: RewardEnsemble, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = ensemble.save_pretrained(tmp_path / "run")
    record_digests(folder, **change)
    with pytest.raises(StorageError, match=message):
        RewardEnsemble.from_pretrained(folder)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
def test_saved_files_have_the_modes_of_new_ones(
    ensemble: RewardEnsemble, tmp_path: Path, mask: int
) -> None:
    with umask(mask):
        folder = ensemble.save_pretrained(tmp_path / "run")
        ensemble.save_pretrained(folder)  # in place, too
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    right = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in modes}
    assert modes == right
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root can change its user")
def test_another_user_can_load_what_is_saved(ensemble: RewardEnsemble, small_folder: Path) -> None:
    shared = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        shared.chmod(0o755)
        backbone = shutil.copytree(small_folder, shared / "backbone")
        for path in [backbone, *backbone.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        with umask(0o022):
            folder = ensemble.save_pretrained(shared / "run")
        code = (
            "import os, sys\n"
            "from ensemble_rm import RewardEnsemble, Sample\n"
            # Modules are imported before the change of user, who may not read this environment.
            "import ensemble_rm.members.heads.scorer, transformers.models.auto\n"
            "load = RewardEnsemble.from_pretrained\n"
            "def score():\n"
            "    ensemble = load(sys.argv[1], backbone=sys.argv[2], device='cpu')\n"
            "    return ensemble.score([Sample('a', 'b')]).reward[0]\n"
            "mine = score()\n"
            "os.setgid(65534)\n"
            "os.setuid(65534)\n"
            "assert score() == mine\n"
        )
        command = [sys.executable, "-c", code, str(folder), str(backbone)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    finally:
        shutil.rmtree(shared)
