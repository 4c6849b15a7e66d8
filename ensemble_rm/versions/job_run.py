"""Shared by the jobs on a run folder: options, outcome, lock, audit line.

Independent of what a job decides.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias, TypeVar

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.errors import ClockError, EnsembleRMError, OptionError
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import as_object, at, reading
from ensemble_rm.versions.options import RunOptions
from ensemble_rm.versions.repository import Versions

Verdict: TypeAlias = Literal["published", "kept", "too few", "drift alarm"]


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """The outcome of one run of a job.

    Attributes
    ----------
    verdict : {"published", "kept", "too few", "drift alarm"}
        ``"published"``: a new version is current. ``"kept"``: the current version stays.
        ``"too few"``: the judgments do not suffice. ``"drift alarm"``: only of `recalibrate`.
    reason : str
        Why, in words.
    run : str
        Identifier of the run, also in the audit log and in the published version.
    incumbent : int
        Number of the version that was current; 1 for a plain ensemble.
    version : int, optional
        Number of the published version; in a dry run, the number it would get.
    dry_run : bool
        Whether nothing was written.
    details : dict
        Judgments, options, gate, sizes, digests; JSON values.
    """

    verdict: Verdict
    reason: str
    run: str
    incumbent: int
    version: int | None
    dry_run: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def change(self) -> str:
        """What the new version changed, for the one-line summary."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: the output of ``--json`` and the audit line."""
        row: dict[str, Any] = finite_or_none(asdict(self))
        return row

    def __str__(self) -> str:
        """Summarise the outcome in one line."""
        version = "" if self.version is None else f" version {self.version}{self.change}"
        note = " (dry run: nothing was written)" if self.dry_run else ""
        if "clock" in self.details:
            note += f"; {self.details['clock']}"
        return f"{self.verdict}{version}: {self.reason}{note}"


Outcome = TypeVar("Outcome", bound=JobOutcome)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a job on a run folder.

    Attributes
    ----------
    versions : Versions
        Of the run folder.
    event : str
        The audit log's name of this kind of job.
    options : RunOptions
    progress : callable
        Called with (stage, done, total).
    run : str
        Identifier of the run.
    """

    versions: Versions
    event: str
    options: RunOptions
    progress: Progress = silent
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:16])

    @contextmanager
    def holding_folder(self) -> Iterator[None]:
        """Lock the folder, remove leftovers of killed jobs, and log errors; not in a dry run.

        Raises
        ------
        LockedError
            If another job works on the folder and `RunOptions.wait` is not set.
        """
        dry_run = self.options.dry_run
        with nullcontext() if dry_run else self.versions.lock(wait=self.options.wait):
            try:
                if not dry_run:
                    self.versions.adopt(progress=self.progress)
                    self.versions.clean()
                    self.repair_log()
                yield
            except (EnsembleRMError, OSError) as error:
                # A full disk may refuse the audit line too; report the first error.
                with suppress(OSError):
                    self._log({"verdict": "error", "reason": f"{type(error).__name__}: {error}"})
                raise

    def repair_log(self) -> None:
        """Append the audit line that a killed run could not write; by default nothing."""

    def finish(self, outcome: Outcome) -> Outcome:
        """Write the run's audit line, except in a dry run, and return the outcome."""
        self._log(outcome.to_json())
        return outcome

    def last_run(self, **details: str) -> dict[str, Any] | None:
        """Return the audit line of the last run, if it had the same inputs and reached a verdict.

        Parameters
        ----------
        **details
            Digests that the line's `details` must contain.

        Returns
        -------
        dict, optional
            None where the last run failed, had other inputs, or was stopped by a pin.
        """
        last = self.versions.audit.last(event=self.event)
        if last is None or last.get("verdict") == "error":
            return None
        with reading(self.versions.audit.path), at("details"):
            known = as_object(last.get("details", {}))
        same = all(known.get(name) == value for name, value in details.items())
        # Once the pin is removed, the same inputs may be published.
        return last if same and not known.get("pinned") else None

    def _log(self, line: dict[str, Any]) -> None:
        if self.options.dry_run:
            return
        at = self.versions.clock().isoformat(timespec="seconds")
        self.versions.audit.append({"event": self.event, "at": at, "run": self.run} | line)


# The clock ---------------------------------------------------------------------------------------


def known_time(versions: Versions) -> datetime:
    """Return the clock's time, or that of the newest judgment that a run read, if it is later.

    A run's own time is no evidence: one run under a clock far ahead would date all later ones.

    Parameters
    ----------
    versions : Versions
    """
    times = [versions.clock().astimezone(UTC)]
    for line in _completed(versions):
        last = (line.get("details") or {}).get("judgments", {}).get("last")
        if last is not None:
            times.append(datetime.fromisoformat(last))
    return max(times)


def check_clock(versions: Versions, options: RunOptions, newest: datetime | None) -> str:
    """Compare the clock with the last run and the newest judgment.

    Parameters
    ----------
    versions : Versions
    options : RunOptions
    newest : datetime, optional
        Time of the newest judgment of the store.

    Returns
    -------
    str
        What the run reports about its clock; empty if there is nothing to report.

    Raises
    ------
    ClockError
        If the clock is more than `max_clock_lead` ahead of both, and `accept_clock` is not set.
    OptionError
        If `max_clock_lead` is not > 0.
    """
    if not options.max_clock_lead > 0:
        raise OptionError(f"max_clock_lead must be > 0 days, not {options.max_clock_lead}")
    now = versions.clock().astimezone(UTC)
    last = None
    for line in _completed(versions):
        last = line
    if last is None:
        return ""
    at = datetime.fromisoformat(last["at"])
    if now < at:
        return (
            f"the clock ({now.isoformat(timespec='seconds')}) is earlier than that of run "
            f"{last['run']} ({last['at']}); if that run's was wrong, withdraw it with "
            f"ensemble-rm versions withdraw-run"
        )
    known = at if newest is None else max(at, newest)
    lead = (now - known) / timedelta(days=1)
    if lead <= options.max_clock_lead:
        return ""
    if not options.accept_clock:
        raise ClockError(
            f"the clock ({now.isoformat(timespec='seconds')}) is {lead:.0f} days ahead of both the "
            f"last run and the newest judgment ({known.isoformat(timespec='seconds')}), more than "
            f"{options.max_clock_lead:g}; set the clock, or accept it with --accept-clock"
        )
    return f"the clock is {lead:.0f} days ahead of the newest judgment and the last run: accepted"


def _completed(versions: Versions) -> Iterator[dict[str, Any]]:
    """Yield the lines of runs that reached a verdict and were not withdrawn, oldest first.

    A refused run leaves a line with its clock too, and must not count as the last run.
    """
    for line in versions.audit.runs():
        if line.get("verdict") not in (None, "error") and "at" in line and "run" in line:
            yield line


def digest_inputs(*parts: Any) -> str:
    """Return the SHA-256 of JSON values, by which a repeated run is recognised."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
