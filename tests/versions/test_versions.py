"""Versions: published whole, numbered in order, moved by one rename; readers see no half."""

from __future__ import annotations

import json
import operator
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import Calibration, RewardEnsemble, Sample, Versions
from ensemble_rm.aggregation import uwo
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import LockedError, StorageError, UnknownVersionsError, VersionError
from ensemble_rm.members import HeadScorer

SAMPLES = [Sample("Who are you?", "A fox " * n) for n in (1, 9, 3, 12)]


def fitted(t: float, *, seed: int = 0, n: int = 300) -> Calibration:
    """A calibration of two members' UWO, with its evidence."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, n, 2))
    margin = uwo(lam=0.5)(first) - uwo(lam=0.5)(second)
    y = (rng.random(n) < 1 / (1 + np.exp(-margin / t))).astype(float)
    pairs = ScoredPairs(first, second, y, np.ones(n), np.arange(n))
    found = fit_calibration(pairs, uwo(lam=0.5), digest=str(seed))
    return replace(found, created="2026-11-25T00:00:00+00:00")


@pytest.fixture
def ensemble(two_heads: Callable[..., HeadScorer]) -> RewardEnsemble:
    plain = RewardEnsemble((two_heads(),), Normaliser((0.1, -0.2), (1.5, 0.5)), uwo(lam=0.5))
    return replace(plain, calibration=fitted(1.0))


@pytest.fixture
def run(ensemble: RewardEnsemble, tmp_path: Path) -> Path:
    return ensemble.save_pretrained(tmp_path / "hh")


def publish(versions: Versions, t: float) -> int:
    return versions.publish_calibration(fitted(t), provenance={"why": "a test"}).number


def test_a_new_calibration_leaves_every_reward_bitwise_as_it_was(run: Path) -> None:
    before = RewardEnsemble.from_pretrained(run, device="cpu")
    versions = Versions(run)
    assert [publish(versions, 3.0), publish(versions, 0.2)] == [2, 3]
    after = before.refresh()
    again = RewardEnsemble.from_pretrained(run, device="cpu")
    for other in (after, again):
        assert other is not before
        np.testing.assert_array_equal(other.score(SAMPLES).reward, before.score(SAMPLES).reward)
        assert other.calibration == fitted(0.2)
        assert other.calibration is not None and other.calibration.evidence is not None
    # No model is loaded again.
    assert all(map(operator.is_, after.scorers, before.scorers))
    one = [ensemble.compare(["a"], ["b b"], ["c"]).probability for ensemble in (before, after)]
    assert one[0] != one[1]


def test_refresh_is_itself_where_nothing_moved(run: Path, ensemble: RewardEnsemble) -> None:
    assert ensemble.refresh() is ensemble
    plain = RewardEnsemble.from_pretrained(run, device="cpu")
    assert plain.refresh() is plain
    publish(Versions(run), 2.0)
    second = plain.refresh()
    assert second.refresh() is second
    publish(Versions(run), 3.0)
    assert second.refresh() is not second
    fixed = RewardEnsemble.from_pretrained(run, version=2, device="cpu")
    assert fixed.refresh() is fixed
    assert fixed.calibration == fitted(2.0)


def test_refresh_keeps_the_aggregator_that_was_asked_for(run: Path) -> None:
    mine = RewardEnsemble.from_pretrained(run, device="cpu").with_aggregator(uwo(lam=0.1))
    publish(Versions(run), 2.0)
    assert mine.refresh().aggregator == uwo(lam=0.1)


def test_a_new_ensemble_is_published_by_the_same_mechanism(
    run: Path, two_heads: Callable[..., HeadScorer]
) -> None:
    versions = Versions(run)
    old = RewardEnsemble.from_pretrained(run, device="cpu")
    publish(versions, 2.0)
    other = RewardEnsemble((two_heads(seed=1),), old.normaliser, old.aggregator)
    third = versions.publish_ensemble(other.save_pretrained, provenance={"why": "retrained"})
    assert (third.number, third.ensemble, third.parent) == (3, 3, 2)
    assert third.members != versions.show(1).members == versions.show(2).members
    new = old.refresh()
    np.testing.assert_array_equal(new.score(SAMPLES).raw, other.score(SAMPLES).raw)
    fourth = versions.publish_calibration(fitted(0.5), provenance={})
    assert (fourth.ensemble, fourth.members) == (3, third.members)
    assert all(map(operator.is_, new.refresh().scorers, new.scorers))
    versions.rollback(2)
    back = new.refresh()
    np.testing.assert_array_equal(back.score(SAMPLES).raw, old.score(SAMPLES).raw)
    assert back.calibration == fitted(2.0)


def test_rollback_moves_along_the_parents_and_removes_nothing(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    publish(versions, 3.0)
    assert versions.rollback().number == 2
    assert publish(versions, 4.0) == 4  # a number is never given twice
    assert versions.current().parent == 2
    assert versions.rollback().number == 2
    assert versions.rollback().number == 1
    with pytest.raises(VersionError, match="is the first"):
        versions.rollback()
    assert [one.number for one in versions.all()] == [1, 2, 3, 4]
    assert versions.rollback(3).number == 3
    with pytest.raises(VersionError, match="versions 1 to 4, but not 7"):
        versions.rollback(7)


def test_a_pin_holds_against_publishing_and_rollback(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    publish(versions, 3.0)
    versions.pin(2)
    with pytest.raises(VersionError, match="2 is pinned"):
        publish(versions, 4.0)
    with pytest.raises(VersionError, match="2 is pinned"):
        versions.rollback()
    assert RewardEnsemble.from_pretrained(run, device="cpu").calibration == fitted(2.0)
    versions.unpin()
    assert versions.current().number == 2
    assert publish(versions, 4.0) == 4
    events = [event["event"] for event in versions.audit.read()]
    named = [event for event in events if event in ("adopted", "pinned", "unpinned")]
    assert named == ["adopted", "pinned", "unpinned"]


def test_adoption_changes_nothing_that_is_read(run: Path) -> None:
    before = RewardEnsemble.from_pretrained(run, device="cpu")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = Versions(run).adopt()
    assert Versions(run).adopt() == first
    after = RewardEnsemble.from_pretrained(run, device="cpu")
    np.testing.assert_array_equal(after.score(SAMPLES).raw, before.score(SAMPLES).raw)
    assert after.calibration == before.calibration
    assert all(path.read_bytes() == content for path, content in files.items())
    with pytest.raises(VersionError, match="contains versions"):
        after.save_pretrained(run)


def test_a_folder_without_versions_or_ensemble_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="contains no versions"):
        Versions(run).current()
    with pytest.raises(VersionError, match="contains no versions"):
        RewardEnsemble.from_pretrained(run, version=1, device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionError, match="neither versions nor an ensemble"):
        Versions(tmp_path / "empty").adopt()
    with pytest.raises(VersionError, match="no such folder"):
        Versions(tmp_path / "none").adopt()
    assert not (tmp_path / "none").exists()


def test_what_a_killed_run_left_is_removed(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    (run / "versions/.new-1-x/ensemble").mkdir(parents=True)
    (run / ".current.json.7.x").write_text("{")
    assert publish(versions, 3.0) == 3
    assert versions.current().calibration == fitted(3.0).to_json() | {"subset_names": []}
    assert sorted(p.name for p in (run / "versions").iterdir()) == ["0001", "0002", "0003"]
    assert not list(run.glob(".current*"))


class Killed(BaseException):
    """What no handler of errors catches, as a kill."""


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("moment", ["rename", "_point", "end"])
def test_the_publication_of_a_killed_process_is_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    """Killed before the rename, before the pointer moves, or before the log's end."""
    versions = Versions(run)
    if number == 2:
        versions.adopt()
    log = versions._log

    def kill(*_: object) -> None:
        raise Killed

    def kill_at_end(event: str, **fields: object) -> None:
        if event == "version published":
            raise Killed
        log(event, **fields)

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", kill)
        elif moment == "end":
            patch.setattr(versions, "_log", kill_at_end)
        else:
            patch.setattr(versions, "_point", kill)
        with pytest.raises(Killed):
            publish(versions, 2.0)
    left = Versions(run)
    left.settle()
    if moment == "rename":
        assert left.versioned == (number == 2)
    else:
        assert left.current().number == left.pointer.newest == number
    assert left._open_intent() is None
    if number == 2 and moment == "_point":
        assert left.current().calibration == fitted(2.0).to_json() | {"subset_names": []}
    expected = left.pointer.newest + 1 if left.versioned else 2
    assert publish(left, 3.0) == expected


@pytest.mark.parametrize("pointer", ["missing", "older"])
def test_no_job_deletes_a_version_that_the_pointer_does_not_know(
    run: Path, ensemble: RewardEnsemble, pointer: str
) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    older = (run / "current.json").read_bytes()
    versions.publish_ensemble(ensemble.save_pretrained, provenance={})
    publish(versions, 3.0)
    (run / "current.json").unlink()
    if pointer == "older":
        (run / "current.json").write_bytes(older)
    before = {p: p.read_bytes() for p in (run / "versions").rglob("*") if p.is_file()}
    for change in (lambda: publish(versions, 4.0), versions.adopt, versions.settle):
        with pytest.raises(UnknownVersionsError, match=r"0004.*versions repair"):
            change()
    versions.clean()
    assert {p: p.read_bytes() for p in (run / "versions").rglob("*") if p.is_file()} == before
    known = [3, 4] if pointer == "older" else [1, 2, 3, 4]
    assert versions.repair() == (known, [])
    assert {p: p.read_bytes() for p in (run / "versions").rglob("*") if p.is_file()} == before
    assert versions.current().number == (2 if pointer == "older" else 4)
    assert publish(versions, 5.0) == 5


def test_a_number_is_never_used_again(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    older = (run / "current.json").read_bytes()
    assert publish(versions, 3.0) == 3
    (run / "versions/0003/version.json").write_text("{")
    (run / "current.json").write_bytes(older)
    assert versions.repair() == ([], [3])
    assert versions.current().number == 2
    assert publish(versions, 4.0) == 4
    assert [version.number for version in versions.all()] == [1, 2, 4]


def test_a_write_that_fails_leaves_the_current_version(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(run)
    publish(versions, 2.0)

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_file", "sync_tree", "replace_file"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ensemble_rm.versions.repository.{name}", failing)
            with pytest.raises(StorageError, match="No space left on device"):
                publish(versions, 3.0)
        assert versions.current().number == 2
        assert RewardEnsemble.from_pretrained(run, device="cpu").calibration == fitted(2.0)
    assert publish(versions, 3.0) == 3


def test_numbers_follow_no_clock(run: Path) -> None:
    for number, year in enumerate((2030, 2020, 2025), start=2):
        versions = Versions(run, clock=lambda year=year: datetime(year, 1, 1, tzinfo=UTC))
        assert publish(versions, 1.0 + number) == number
        assert versions.current().created_at.startswith(str(year))


def test_one_writer_at_a_time(run: Path) -> None:
    refused = pytest.raises(LockedError, match="another process")
    with Versions(run).lock(), refused, Versions(run).lock(wait=False):
        pass
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda t=t: numbers.append(publish(Versions(run), t)))
        for t in (1.0, 2.0, 3.0, 4.0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [2, 3, 4, 5]


def test_readers_during_publishing_see_whole_versions(run: Path) -> None:
    versions = Versions(run)
    versions.adopt()
    done = threading.Event()
    seen: list[list[int]] = [[], []]
    problems: list[Exception] = []

    def read(reader: int) -> None:
        while not done.is_set():
            try:
                version = versions.current()
                found = version.read_calibration()
                assert found is not None and found.temperature > 0
                seen[reader].append(version.number)
            except (OSError, StorageError, AssertionError) as error:
                problems.append(error)

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(2)]
    for reader in readers:
        reader.start()
    calibration = replace(fitted(2.0), evidence=None)
    for number in range(1000):  # or until both have seen some, however seldom they have a turn
        Versions(run).publish_calibration(calibration, provenance={})
        if number >= 30 and all(len(set(numbers)) > 2 for numbers in seen):
            break
    done.set()
    for reader in readers:
        reader.join()
    assert not problems
    for numbers in seen:
        assert numbers == sorted(numbers) and len(set(numbers)) > 2


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("current.json", "{", r"current\.json: not valid JSON"),
        ("current.json", "{}", r"current\.json: version: missing"),
        ("versions/0002/version.json", "{}", r"version 2 of .*version\.json: format: missing"),
        ("versions/0002/version.json", '{"format": 9}', "format 9"),
    ],
)
def test_damage_is_said(run: Path, file: str, text: str, message: str) -> None:
    publish(Versions(run), 2.0)
    (run / file).write_text(text)
    with pytest.raises(StorageError, match=message):
        RewardEnsemble.from_pretrained(run, device="cpu")


def test_the_audit_log_survives_a_line_cut_short(run: Path) -> None:
    versions = Versions(run)
    publish(versions, 2.0)
    with versions.audit.path.open("a") as stream:
        stream.write('{"event": "recali')
    versions.pin()
    ends = ["publishing", "version published"]
    events = [event["event"] for event in versions.audit.read()]
    assert events == [*ends, "adopted", *ends, "pinned"]
    json.loads(versions.audit.path.read_text().splitlines()[-1])
