"""Whatever is in a saved ensemble's JSON files, it loads in its domain or is a StorageError."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ensemble_rm import RewardEnsemble, Versions
from ensemble_rm.drift import past_checks
from ensemble_rm.drift.state import read_state
from ensemble_rm.errors import ModelError, RemoteNotAllowedError, StorageError
from tests.support.json_values import DEEP, ODD_VALUES, json_values, nodes, replaced

# They were saved before digests were recorded.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ensemble_rm.errors.UnverifiedWarning"),
    pytest.mark.filterwarnings("ignore:.*names an environment variable for its token:UserWarning"),
]

SAVED = Path(__file__).resolve().parent.parent / "fixtures" / "saved_0_1"
NAMES = ("head-rao-kupper", "head-isotonic", "head-histogram", "lora", "full", "implicit")
SERVERS = ("remote", "judge")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the saved ensembles that tests may damage and restore."""
    return shutil.copytree(SAVED, tmp_path_factory.mktemp("damaged") / "saved")


@pytest.fixture(autouse=True)
def next_to_the_models(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name their backbones relative to their folder."""
    monkeypatch.chdir(saved)


def load(folder: Path) -> RewardEnsemble:
    return RewardEnsemble.from_pretrained(folder, device="cpu", allow_remote=["127.0.0.1"])


def check_domain(ensemble: RewardEnsemble) -> None:
    """What every formula relies on."""
    assert np.isfinite(ensemble.normaliser.offset).all() and min(ensemble.normaliser.scale) > 0
    calibration = ensemble.calibration
    if calibration is not None:
        for t in (calibration.temperature, calibration.mixture_temperature):
            assert 0 < t < math.inf
        p = calibration.probability([-1.0, 0.0, 1.0])
        assert (np.diff(p) >= -1e-12).all() or calibration.curve is not None
        assert ((p >= 0) & (p <= 1)).all() and p[1] == 0.5


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


@pytest.mark.parametrize("name", [*NAMES, *SERVERS, "versions"])
def test_any_value_anywhere_loads_in_its_domain_or_is_a_storage_error(
    saved: Path, name: str
) -> None:
    folder = saved / name
    paths = [p for p in files_of(folder) if "model" not in p.relative_to(folder).parts]

    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(paths))
        text = path.read_text(encoding="utf-8")
        row = json.loads(text)
        place = data.draw(st.sampled_from([p for p in nodes(row) if len(p) < 6]))
        value = data.draw(json_values() | st.sampled_from(ODD_VALUES))
        path.write_text(json.dumps(replaced(row, place, value)), encoding="utf-8")
        try:
            check_domain(load(folder))
            versions = Versions(folder)
            if versions.versioned:
                [version.read_calibration() for version in versions.all()]
                read_state(folder, versions.current())
                past_checks(folder)
        except (StorageError, ModelError, RemoteNotAllowedError):
            pass  # a backbone's name that is text is none of a schema's business
        finally:
            path.write_text(text, encoding="utf-8")

    check()


def edit(path: Path, *place: str | int, value: Any) -> None:
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), place, value)))


def forget_versions(run: Path) -> None:
    """Leave the plain ensemble, from which the versions were made."""
    (run / "current.json").unlink()
    shutil.rmtree(run / "versions")


@pytest.fixture
def run(saved: Path) -> Iterator[Path]:
    """The saved versions, restored afterwards."""
    folder = saved / "versions"
    kept = shutil.copytree(folder, saved / "kept")
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


@pytest.mark.parametrize("value", [-5, 0, math.nan, math.inf, True, "1", None, [1.0]])
@pytest.mark.parametrize(
    "place",
    [
        ("calibration", "fit", "temperature"),
        ("calibration", "mixture_temperature"),
        ("calibration", "fit", "log_se"),
        ("normaliser", "scale", 0),
    ],
)
def test_a_number_outside_its_domain_is_named(
    run: Path, place: tuple[str | int, ...], value: Any
) -> None:
    if place[-1] == "log_se" and value == 0 and value is not True:
        value = -0.1  # 0 is in its domain
    forget_versions(run)
    path = run / "ensemble.json"
    edit(path, *place, value=value)
    with pytest.raises(StorageError) as caught:
        load(run)
    message = str(caught.value)
    assert message.startswith(f"{path}: {place[0]}") and message.endswith("or save it again")
    shown = float(value) if type(value) in (int, float) else value
    assert isinstance(value, list) or repr(shown) in message


@pytest.mark.parametrize("value", [-5, 0, math.nan])
@pytest.mark.parametrize("use", [load, lambda run: Versions(run).current()])
def test_a_versions_temperature_is_in_its_domain(
    run: Path, value: float, use: Callable[[Path], object]
) -> None:
    edit(run / "versions/0002/version.json", "calibration", "fit", "temperature", value=value)
    with pytest.raises(StorageError, match=r"0002/version\.json: calibration\.fit.*temperature"):
        use(run)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("number",), 3, "number: must be 2, not 3"),
        (("kind",), "both", r"kind: must be one of 'ensemble', 'calibration', not 'both'"),
        (("ensemble",), 3, "version 2 cannot belong to ensemble 3"),
        (("ensemble",), "1/../..", "ensemble: must be a whole number"),
        (("parent",), 2, "version 2 cannot have the parent 2"),
        (("created_at",), "yesterday", "created_at must be a time in ISO 8601, not 'yesterday'"),
        (("calibration",), None, "version 2 is a calibration and has none"),
        (("calibration", "created"), "?", "calibration: created must be a time"),
        (("calibration", "subset_names"), 3, r"calibration\.subset_names: must be a list"),
    ],
)
def test_a_version_is_consistent(
    run: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    edit(run / "versions/0002/version.json", *place, value=value)
    with pytest.raises(StorageError, match=message):
        load(run)


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        ({"version": 2, "newest": 3.9, "pinned": False}, "newest: must be a whole number, not 3.9"),
        ({"version": 2, "newest": 2, "pinned": "false"}, "pinned: must be true or false"),
        ({"version": 0, "newest": 2, "pinned": False}, "version 0 cannot be current of 2"),
        ({"version": 3, "newest": 2, "pinned": False}, "version 3 cannot be current of 2"),
        ({"version": 2, "pinned": False}, "newest: missing"),
        ({"version": 2, "newest": 2, "pinned": False, "x": 1}, "x: unknown; the fields are"),
        ([2, 2, False], "must be an object, not a list of 3"),
    ],
)
def test_a_pointer_is_read_strictly(run: Path, pointer: Any, message: str) -> None:
    (run / "current.json").write_text(json.dumps(pointer))
    with pytest.raises(StorageError, match=rf"current\.json: .*{message}"):
        load(run)


@pytest.mark.parametrize(
    "folder",
    ["/etc", "..", "../head", "members/../../head", "C:\\x", "\\\\host\\x", "", ".", "a\0"],
)
def test_a_members_folder_is_inside_the_ensembles(saved: Path, run: Path, folder: str) -> None:
    path = run / "versions/0001/ensemble/ensemble.json"
    edit(path, "members", 0, "folder", value=folder)
    with pytest.raises(StorageError, match=r"members\.0: .* is not a folder inside"):
        load(run)


@pytest.mark.parametrize("text", ["[" * 200_000, json.dumps(DEEP), "[1]", "null", '"x"', "3"])
@pytest.mark.parametrize("file", ["ensemble.json", "members/0/member.json"])
def test_a_file_of_another_shape_is_no_traceback(
    saved: Path, run: Path, file: str, text: str
) -> None:
    forget_versions(run)
    (run / file).write_text(text)
    with pytest.raises(StorageError, match=r"nested deeper|must be an object"):
        load(run)


def test_a_judges_rubric_is_no_path(saved: Path) -> None:
    path = saved / "judge/members/0/member.json"
    text = path.read_text()
    edit(path, "rubric", value=str(path))
    with pytest.raises(StorageError, match="rubric: must be an object"):
        load(saved / "judge")
    path.write_text(text)


def test_one_can_roll_back_from_a_version_that_cannot_be_read(run: Path) -> None:
    edit(run / "versions/0002/version.json", "calibration", "fit", "temperature", value=-5)
    with pytest.raises(StorageError):
        Versions(run).rollback()  # whose parent is in that file
    assert Versions(run).rollback(1).number == 1
    check_domain(load(run))
