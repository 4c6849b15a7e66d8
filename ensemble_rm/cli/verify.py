"""``ensemble-rm verify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import RUN, Loading
from ensemble_rm.cli.options import argument, nested
from ensemble_rm.errors import DigestMismatchError, EnsembleRMError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check saved files against the digests that were recorded when they were saved.

    Every version's files are hashed and compared; the current version is loaded as well, which
    also checks the files of its backbone. Exit code 14 if a file is missing, new or another one.
    """

    run_folder: Path = argument(RUN, metavar="RUN")
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = "  ensemble-rm verify runs/hh"

    def run(self, console: Console) -> None:
        """Check the files."""
        from ensemble_rm.file_digests import FileCheck
        from ensemble_rm.versions.integrity import check_ensemble
        from ensemble_rm.versions.repository import Versions
        from ensemble_rm.versions.version import locate

        versions = Versions(self.run_folder)
        versions.incumbent()  # raises a clear error if the folder contains no ensemble
        check = FileCheck()  # one for all versions: files that several of them share are read once
        checked: list[dict[str, Any]] = []
        for version in versions.all():
            problem = None
            try:
                located = locate(self.run_folder, version.number)
                check_ensemble(located.ensemble, located.members, check)
            except EnsembleRMError as error:
                problem = str(error)
            checked.append({"version": version.number, "problem": problem})
        try:
            self.loading.open(self.run_folder)
            checked.append({"version": "current, loaded", "problem": None})
        except EnsembleRMError as error:
            checked.append({"version": "current, loaded", "problem": str(error)})
        bad = [entry for entry in checked if entry["problem"] is not None]
        if bad:
            problems = "; ".join(f"{entry['version']}: {entry['problem']}" for entry in bad)
            raise DigestMismatchError(
                f"{len(bad)} of {len(checked)} checks failed: {problems}. Restore the files from a "
                f"backup, or go back with ensemble-rm versions rollback {self.run_folder}"
            )
        console.result(
            {"checked": checked}, f"{len(checked)} checks passed: {self.run_folder} is intact"
        )
