"""An ensemble's directory: replaced as a whole or not at all, and what is wrong in it said."""

from __future__ import annotations

from collections.abc import Callable
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
