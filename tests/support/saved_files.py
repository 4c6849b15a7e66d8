"""Change saved files as somebody would who can also write their digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble_rm.file_digests import FileCheck, digests_json, files_below, seal


def rewrite_json(path: Path, change: Mapping[str, Any]) -> None:
    """Change fields of a JSON file; None removes one."""
    row = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: x for name, x in row.items() if x is not None}))


def record_digests(ensemble: Path, **change: Any) -> None:
    """Change fields of an ensemble's manifest, and record the present files as the saved ones."""
    path = ensemble / "ensemble.json"
    row = json.loads(path.read_text()) | change
    row.pop("sha256", None)
    names = [name for name in files_below(ensemble) if name != path.name]
    row["files"] = digests_json(FileCheck().digests(ensemble, names))
    path.write_text(json.dumps(seal(row)))


def forget_digests(ensemble: Path) -> None:
    """Make a saved ensemble one of the versions that recorded no digests."""
    for path in ensemble.rglob("*.json"):
        if path.name in ("ensemble.json", "member.json", "version.json"):
            row = json.loads(path.read_text())
            kept = {name: x for name, x in row.items() if name not in ("files", "sha256")}
            path.write_text(json.dumps(kept))
