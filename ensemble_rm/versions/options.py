"""How a job uses a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a job uses the run folder.

    Attributes
    ----------
    dry_run : bool
        Report what would happen and write nothing.
    wait : bool
        Wait for another job on the same folder instead of raising `LockedError`.
    """

    dry_run: bool = field(
        default=False, metadata={"help": "report what would happen and write nothing"}
    )
    wait: bool = field(
        default=False, metadata={"help": "wait for another job on the folder instead of failing"}
    )
