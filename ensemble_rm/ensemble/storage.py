"""An ensemble's directory: ``ensemble.json``, ``members/``, ``calibration.safetensors``.

Written to a temporary folder and renamed, so that a reader never sees half of it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.normaliser import Normaliser
from ensemble_rm.errors import OptionError, StorageError, VersionError
from ensemble_rm.file_digests import FileCheck, Verify, digests_json, files_below, seal
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.members.registry import member_kind
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.saved_json import at, reading
from ensemble_rm.uncertainty.distance import FeatureSpace
from ensemble_rm.versions.integrity import check_ensemble
from ensemble_rm.versions.manifest import FILE, FORMAT
from ensemble_rm.versions.version import (
    EVIDENCE,
    FEATURES,
    Version,
    is_versioned,
    read_evidence,
    subset_names,
)


def save(
    folder: Path,
    *,
    scorers: Sequence[Scorer],
    normaliser: Normaliser,
    aggregator: Aggregator,
    calibration: Calibration | None,
    provenance: dict[str, Any],
    feature_space: FeatureSpace | None = None,
) -> Path:
    """Write an ensemble's directory."""
    # Before any file is written: a refusal leaves nothing behind.
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent, hence on the same file system: the rename cannot become a copy.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        members = []
        for i, scorer in enumerate(scorers):
            scorer.save(scratch / "members" / str(i))
            members.append({"kind": scorer.kind, "folder": f"members/{i}"})
        if calibration is not None and calibration.evidence is not None:
            _save_arrays(calibration.evidence.arrays(), scratch / EVIDENCE)
        if feature_space is not None:
            _save_arrays(feature_space.arrays(), scratch / FEATURES)
        manifest = {
            "format": FORMAT,
            "members": members,
            "normaliser": normaliser.to_json(),
            "aggregator": aggregator.to_json(),
            "calibration": None if calibration is None else _calibration_json(calibration),
            "provenance": provenance,
            "files": digests_json(FileCheck().digests(scratch, files_below(scratch))),
        }
        text = json.dumps(seal(manifest), indent=1, ensure_ascii=False)
        (scratch / FILE).write_text(text + "\n", encoding="utf-8")
        # Another user's server must be able to read what is saved.
        follow_umask(scratch)
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def check_target(folder: Path) -> None:
    """Check that an ensemble may be saved in a folder; call it before long work, too.

    Raises
    ------
    VersionError
        If it contains versions, which a save would replace.
    StorageError
        If it contains something else.
    """
    if is_versioned(folder):
        raise VersionError(
            f"{folder} contains versions, which a save would replace; save to another folder, or "
            "publish with `ensemble-rm recalibrate`"
        )
    if not folder.exists() or (folder / FILE).exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise StorageError(f"{folder} is not empty and contains no ensemble; choose another folder")


def _save_arrays(arrays: dict[str, Any], path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _calibration_json(calibration: Calibration) -> dict[str, Any]:
    names = () if calibration.evidence is None else calibration.evidence.subset_names
    return calibration.to_json() | {"subset_names": list(names)}


def _feature_space(path: Path) -> FeatureSpace | None:
    return FeatureSpace.from_arrays(load_file(path)) if path.exists() else None


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        # The new folder could not take the name, so the old one gets it back.
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path,
    *,
    backbone: str | Path | None,
    device: str | None,
    cache_dir: Path | None,
    trust_remote_code: Sequence[str] = (),
    verify: Verify = "full",
    version: Version | None = None,
) -> dict[str, Any]:
    """Return the parts of an ensemble by the names of its fields.

    Parameters
    ----------
    folder : Path
        Of ``ensemble.json``.
    backbone : str or Path, optional
        Where the backbone is now.
    device : str, optional
    cache_dir : Path, optional
        For converted GGUF weights.
    verify : {"full", "stat"}
        How the files are compared with their digests.
    version : Version, optional
        Whose members these are.

    Raises
    ------
    DigestMismatchError
        If a file is not the one that was saved.
    StorageError
        If there is no ensemble, or a damaged one.
    """
    check = FileCheck(verify)
    manifest = check_ensemble(folder, version, check)
    calibration, stored = None, manifest.calibration
    # Before the members: a damaged file should not cost the loading of a model.
    with reading(folder / FILE):
        kinds = []
        for i, member in enumerate(manifest.members):
            with at("members", i, "kind"):
                kinds.append(member_kind(member.kind))
        if stored is not None:
            evidence = read_evidence(folder / EVIDENCE, subset_names(stored))
            with at("calibration"):
                calibration = Calibration.from_json(stored, evidence=evidence)
    try:
        feature_space = _feature_space(folder / FEATURES)
        scorers = [
            kind.scorer_class().load(
                folder / member.folder,
                backbone=backbone,
                device=device,
                cache_dir=cache_dir,
                check=check,
                trust_remote_code=trust_remote_code,
            )
            for kind, member in zip(kinds, manifest.members, strict=True)
        ]
    except (LookupError, TypeError, OSError, SafetensorError, OptionError) as error:
        raise StorageError(f"{folder} is damaged: {error!r}") from error
    return {
        "scorers": tuple(scorers),
        "normaliser": manifest.normaliser,
        "aggregator": manifest.aggregator,
        "calibration": calibration,
        "provenance": manifest.provenance,
        "feature_space": feature_space,
    }
