"""``ensemble-rm versions``: list, show, rollback, pin, unpin, withdraw-run, repair."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import RUN
from ensemble_rm.cli.options import argument, option

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.versions.version import Version


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the versions of an ensemble and its calibrations, and mark the current one."""

    run_folder: Path = argument(RUN, metavar="RUN")

    example: ClassVar[str] = "  ensemble-rm versions list runs/hh"

    def run(self, console: Console) -> None:
        """List them."""
        from ensemble_rm.versions.repository import Versions

        versions = Versions(self.run_folder)
        if not versions.versioned:
            first = versions.incumbent()  # a named error where there is no ensemble at all
            data: dict[str, Any] = {"versions": [], "current": None, "pinned": False}
            text = "no versions yet: a plain ensemble, which its first recalibration makes version "
            console.result(data, f"{text}1\n{describe(first)}")
            return
        pointer, every = versions.pointer, versions.all()
        data = {
            "versions": [version.to_json() for version in every],
            "current": pointer.version,
            "pinned": pointer.pinned,
        }
        lines = []
        for version in every:
            mark = "  "
            if version.number == pointer.version:
                mark = "p " if pointer.pinned else "* "
            lines.append(mark + describe(version))
        lines.append("p is current, and pinned" if pointer.pinned else "* is current")
        console.result(data, "\n".join(lines))
        console.next(f"ensemble-rm versions show {self.run_folder} {pointer.version}")


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show one version: its calibration, the judgments it was fitted on, the gate, its parent."""

    run_folder: Path = argument(RUN, metavar="RUN")
    number: int | None = argument("version", default=None, metavar="N", shown="the current one")

    example: ClassVar[str] = "  ensemble-rm versions show runs/hh 3"

    def run(self, console: Console) -> None:
        """Show it."""
        from ensemble_rm.versions.repository import Versions

        versions = Versions(self.run_folder)
        version = versions.current() if self.number is None else versions.show(self.number)
        text = json.dumps(version.to_json(), indent=1, ensure_ascii=False)
        console.result(version.to_json(), f"{describe(version)}\n{text}")


@dataclass(frozen=True, kw_only=True)
class Rollback(Command):
    """Make an earlier version current; later ones are kept, and jobs continue from it."""

    run_folder: Path = argument(RUN, metavar="RUN")
    to: int | None = option(
        "version to go back to", default=None, metavar="N", shown="the parent of the current one"
    )

    example: ClassVar[str] = (
        "  ensemble-rm versions rollback runs/hh\n  ensemble-rm versions rollback runs/hh --to 2"
    )

    def run(self, console: Console) -> None:
        """Go back."""
        from ensemble_rm.versions.repository import Versions

        version = Versions(self.run_folder).rollback(self.to)
        console.result(version.to_json(), f"current: {describe(version)}")
        console.next(f"ensemble-rm versions pin {self.run_folder}")


@dataclass(frozen=True, kw_only=True)
class Pin(Command):
    """Make a version current and keep every job from changing it, until `versions unpin`."""

    run_folder: Path = argument(RUN, metavar="RUN")
    number: int | None = argument("version", default=None, metavar="N", shown="the current one")

    example: ClassVar[str] = "  ensemble-rm versions pin runs/hh 2"

    def run(self, console: Console) -> None:
        """Pin it."""
        from ensemble_rm.versions.repository import Versions

        version = Versions(self.run_folder).pin(self.number)
        console.result(version.to_json(), f"pinned: {describe(version)}")
        console.next(f"ensemble-rm versions unpin {self.run_folder}")


@dataclass(frozen=True, kw_only=True)
class Unpin(Command):
    """Let jobs publish again; the pinned version stays current until one does."""

    run_folder: Path = argument(RUN, metavar="RUN")

    example: ClassVar[str] = "  ensemble-rm versions unpin runs/hh"

    def run(self, console: Console) -> None:
        """Unpin it."""
        from ensemble_rm.versions.repository import Versions

        version = Versions(self.run_folder).unpin()
        console.result(version.to_json(), f"current: {describe(version)}")


@dataclass(frozen=True, kw_only=True)
class WithdrawRun(Command):
    """Take a job's run out of account, such as one under a wrong clock or on a wrong store.

    Its lines stay in RUN/audit.jsonl, and so does a version that it published.
    """

    run_folder: Path = argument(RUN, metavar="RUN")
    withdrawn: str = argument("identifier of the job's run, as in audit.jsonl", metavar="ID")

    example: ClassVar[str] = "  ensemble-rm versions withdraw-run runs/hh 6c1f0a2b9d3e4f58"

    def run(self, console: Console) -> None:
        """Withdraw it."""
        from ensemble_rm.versions.repository import Versions

        version = Versions(self.run_folder).withdraw_run(self.withdrawn)
        number = None if version is None else version.number
        text = f"withdrawn: run {self.withdrawn}"
        if version is not None:
            text += f"; version {number}, which it published, is still current"
            console.next(f"ensemble-rm versions rollback {self.run_folder}")
        console.result({"withdrawn": self.withdrawn, "published": number}, text)


@dataclass(frozen=True, kw_only=True)
class Repair(Command):
    """List what crashes and restores left behind; repair it only with --yes.

    Scratch files are removed. Versions that current.json does not know become known; the current
    version stays. Damaged ones are set aside, never deleted.
    """

    run_folder: Path = argument(RUN, metavar="RUN")
    yes: bool = option("repair what is listed", default=False)

    example: ClassVar[str] = "  ensemble-rm versions repair runs/hh --yes"

    def run(self, console: Console) -> int:
        """List, or repair."""
        from ensemble_rm.versions.repository import Versions

        versions = Versions(self.run_folder)
        leftovers = [path.name for path in versions.leftovers()]
        unknown = versions.unknown()
        # The plain ensemble may be gone where versions exist; without either, a named error.
        if not unknown:
            versions.incumbent()
        data: dict[str, Any] = {"leftovers": leftovers, "unknown": unknown, "repaired": False}
        if not leftovers and not unknown:
            console.result(data, "nothing to repair")
            return 0
        if not self.yes:
            text = (
                f"scratch files: {leftovers}; versions that current.json does not know: {unknown}"
            )
            console.result(data, f"{text}; nothing changed")
            console.next(f"ensemble-rm versions repair {self.run_folder} --yes")
            return 14
        known, aside = versions.repair()
        removed = versions.clean()
        data |= {"repaired": True, "known": known, "aside": aside, "removed": removed}
        console.result(data, f"known now: {known}; set aside: {aside}; removed: {removed}")
        console.next(f"ensemble-rm versions list {self.run_folder}")
        return 0


def describe(version: Version) -> str:
    """Return a version in one line."""
    calibration = version.read_calibration()
    what = "no calibration"
    if calibration is not None:
        fit = calibration.fit
        what = (
            f"{calibration.aggregator}, T = {fit.temperature:.4f} [{fit.low:.4f}, {fit.high:.4f}] "
            f"from {fit.judgments} judgments"
        )
    of = f" of ensemble {version.ensemble}" if version.kind == "calibration" else ""
    return f"{version.number:4d}  {version.created_at}  {version.kind}{of}: {what}"
