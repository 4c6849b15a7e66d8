"""What every job on a run folder does around its work: the lock, the tidying, the line in the log.

Knows nothing of what a job decides.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from ensemble_rm.errors import EnsembleRMError
from ensemble_rm.versions.repository import Versions


@dataclass(frozen=True)
class RunLog:
    """Where one run of a job writes its line.

    Attributes
    ----------
    versions : Versions
        Of the run folder.
    event : str
        Name of the job's kind of line.
    dry_run : bool
        Write nothing.
    run : str
        Name of the run.
    """

    versions: Versions
    event: str
    dry_run: bool
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:16])

    def write(self, said: dict[str, Any]) -> None:
        """Append the run's line, but in a dry run."""
        if self.dry_run:
            return
        at = self.versions.clock().isoformat(timespec="seconds")
        self.versions.audit.append({"event": self.event, "at": at, "run": self.run} | said)


@contextmanager
def working(
    log: RunLog, *, wait: bool, prepare: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the folder, tidy it, and log what fails; in a dry run do none of it.

    Parameters
    ----------
    log : RunLog
    wait : bool
        For another job on the folder to end, instead of raising.
    prepare : callable, optional
        Called once the folder is held and tidy.

    Raises
    ------
    LockedError
        If another job works on the folder, and `wait` is not set.
    """
    versions = log.versions
    with nullcontext() if log.dry_run else versions.lock(wait=wait):
        try:
            if not log.dry_run:
                versions.adopt()
                versions.clean()
                if prepare is not None:
                    prepare()
            yield
        except (EnsembleRMError, OSError) as error:
            with suppress(OSError):
                log.write({"verdict": "error", "reason": f"{type(error).__name__}: {error}"})
            raise
