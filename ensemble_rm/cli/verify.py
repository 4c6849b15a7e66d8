"""``ensemble-rm verify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import RUN, Loading
from ensemble_rm.cli.options import argument, nested
from ensemble_rm.errors import EnsembleRMError, StorageError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check saved files against the digests that were recorded when they were saved.

    The members' files and the normaliser of every version are compared with the version's digest;
    the current version is loaded, which also checks the backbone's weights. An ensemble without
    versions has no recorded digest and is only loaded. Exit code 4 if a file differs.
    """

    run_folder: Path = argument(RUN, metavar="RUN")
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = "  ensemble-rm verify runs/hh"

    def run(self, console: Console) -> None:
        """Check the files."""
        from ensemble_rm.versions.repository import Versions, digest_members

        versions = Versions(self.run_folder)
        versions.incumbent()  # raises a clear error if the folder contains no ensemble
        checked: list[dict[str, Any]] = []
        for version in versions.all():
            # A calibration has the members of its ensemble; its digest is that of those members.
            digest, problem = "", None
            try:
                digest = digest_members(versions.ensemble_folder(version))
            except EnsembleRMError as error:
                problem = str(error)
            if problem is None and digest != version.members:
                problem = f"members have digest {digest[:12]}, not {version.members[:12]}"
            checked.append({"version": version.number, "problem": problem})
        try:
            self.loading.open(self.run_folder)
            checked.append({"version": "current, loaded", "problem": None})
        except EnsembleRMError as error:
            checked.append({"version": "current, loaded", "problem": str(error)})
        bad = [entry for entry in checked if entry["problem"] is not None]
        if bad:
            problems = "; ".join(f"{entry['version']}: {entry['problem']}" for entry in bad)
            raise StorageError(
                f"{len(bad)} of {len(checked)} checks failed: {problems}. Restore the files from a "
                f"backup, or go back with ensemble-rm versions rollback {self.run_folder}"
            )
        console.result(
            {"checked": checked}, f"{len(checked)} checks passed: {self.run_folder} is intact"
        )
