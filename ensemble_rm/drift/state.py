"""The current version's labelled drift test, with its state on disk.

A version's life begins with its publication; the test takes every judgment newer than those of the
version's fit, once. A version's folder never changes, so the state is in ``drift/0003.json``.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.drift.labelled import DriftTest
from ensemble_rm.drift.options import DriftOptions
from ensemble_rm.errors import StorageError
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.saved_json import at, read_json
from ensemble_rm.versions.atomic_files import json_bytes, replace_file, storage_errors
from ensemble_rm.versions.version import Version

FOLDER = "drift"


def life_start(version: Version, calibration: Calibration) -> float:
    """Return the time of the newest judgment of a version's fit, in seconds.

    If that is not recorded, the time of the fit.
    """
    with at("provenance", "judgments", "last"):
        last = version.provenance.get("judgments", {}).get("last")
        return datetime.fromisoformat(calibration.created if last is None else last).timestamp()


def state_file(folder: Path, version: Version) -> Path:
    """Return the path of a version's state."""
    return folder / FOLDER / f"{version.number:04d}.json"


def read_state(folder: Path, version: Version) -> DriftTest | None:
    """Return the state of a version's test; None if it has not begun.

    Raises
    ------
    StorageError
        If it is damaged.
    """
    path = state_file(folder, version)
    if not path.exists():
        return None
    try:
        return DriftTest.from_json(read_json(path))
    except StorageError as error:
        raise StorageError(
            f"{path} is damaged ({error}); delete it to restart the test, whose bound on false "
            "alarms then counts from now on"
        ) from error


def write_state(folder: Path, version: Version, state: DriftTest) -> None:
    """Replace the stored state."""
    path = state_file(folder, version)
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json_bytes(state.to_json()))


def watch(
    folder: Path,
    version: Version,
    calibration: Calibration,
    data: DatedMargins,
    *,
    inclusion: Any,
    options: DriftOptions,
    at: str,
) -> DriftTest:
    """Return the test after the judgments that are new to it; nothing is written.

    Parameters
    ----------
    folder : Path
        Of the versions.
    version : Version
        The current one.
    calibration : Calibration
        Its own.
    data : DatedMargins
        The window's judgments. Those as old as the version's fit are left out, and so are later
        judgments of its prompts, as far as they are in the window.
    inclusion : ndarray, shape (n_judgments,)
        Selection probability π of each pair; 1 for random draws.
    options : DriftOptions
        Used if the test starts now; a running test keeps its own.
    at : str
        Name of the batch.

    Returns
    -------
    DriftTest
    """
    state = read_state(folder, version)
    if state is None:
        state = DriftTest.start(calibration.fit, promise=options.alpha, tolerance=options.tolerance)
    # Provenance holds whole seconds.
    fresh = data.times >= life_start(version, calibration) + 1
    # Prompts of the fit are not independent of it, so their later judgments are left out.
    fresh &= ~np.isin(data.groups, data.groups[~fresh])
    rows = np.flatnonzero(fresh)
    # The test is sequential: its bettors must not see later judgments first.
    rows = rows[np.argsort(data.times[rows], kind="stable")]
    if not len(rows):
        return state
    return state.update(
        data.margins[rows],
        data.targets[rows],
        prompts=data.groups[rows],
        at=at,
        inclusion=inclusion[rows],
    )


def summarise(state: DriftTest) -> dict[str, Any]:
    """Return the test's state for a job's outcome."""
    return {
        "alarm": state.alarm,
        "alarmed_at": state.alarmed_at,
        "direction": state.direction,
        "log_e": state.log_e,
        "prompts": state.prompts,
        "null": [state.low, state.high],
        "promise": state.promise,
    }
