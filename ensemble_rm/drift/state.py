"""The labelled drift test of the version that is current, its state kept beside the versions.

Each life begins with a publication and takes every judgment that is newer than those the version
was fitted on, once. A version's folder never changes, so the state lies in ``drift/0003.json``.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.drift.labelled import DriftTest
from ensemble_rm.drift.options import DriftOptions
from ensemble_rm.errors import EnsembleRMError, StorageError
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.versions.atomic_files import json_bytes, read_json, replace_file, storage_errors
from ensemble_rm.versions.version import Version

FOLDER = "drift"


def life_start(version: Version, calibration: Calibration) -> float:
    """Return when the last judgment of a version's fit was given, seconds.

    Where the version does not say, when it was fitted.
    """
    last = version.provenance.get("judgments", {}).get("last")
    return datetime.fromisoformat(calibration.created if last is None else last).timestamp()


def state_file(folder: Path, version: Version) -> Path:
    """Return where a version's state lies."""
    return folder / FOLDER / f"{version.number:04d}.json"


def read_state(folder: Path, version: Version) -> DriftTest | None:
    """Return the state of a version's life; None where it has not begun.

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
    except (KeyError, TypeError, ValueError, EnsembleRMError) as error:
        raise StorageError(
            f"{path} is damaged ({error}); without it the life's guarantee is void: delete it to "
            "begin anew"
        ) from error


def write_state(folder: Path, version: Version, state: DriftTest) -> None:
    """Put a state in place of the last one."""
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
        The window's judgments. Those as old as the version's own are left out, and so are later
        ones of prompts that it was fitted on, as far as the window shows them.
    inclusion : ndarray, shape (n_judgments,)
        Probability π with which each pair was selected; 1 for random draws.
    options : DriftOptions
        Of a life that begins now; one that goes on keeps its own.
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
    fresh &= ~np.isin(data.groups, data.groups[~fresh])
    rows = np.flatnonzero(fresh)
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
    """Return what a run says of the test."""
    return {
        "alarm": state.alarm,
        "alarmed_at": state.alarmed_at,
        "direction": state.direction,
        "log_e": state.log_e,
        "prompts": state.prompts,
        "null": [state.low, state.high],
        "promise": state.promise,
    }
