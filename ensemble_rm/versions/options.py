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
    accept_rewound_store : bool
        Accept a judgment store that lacks judgments which the last run read, once.
    accept_clock : bool
        Accept a clock that is more than `max_clock_lead` ahead, once.
    max_clock_lead : float
        Days by which the clock may be ahead of both the last run and the newest judgment, > 0.
    """

    dry_run: bool = field(
        default=False, metadata={"help": "report what would happen and write nothing"}
    )
    wait: bool = field(
        default=False, metadata={"help": "wait for another job on the folder instead of failing"}
    )
    accept_rewound_store: bool = field(
        default=False,
        metadata={"help": "accept a store that lacks judgments which the last run read"},
    )
    accept_clock: bool = field(
        default=False, metadata={"help": "accept a clock that is further ahead than max-clock-lead"}
    )
    max_clock_lead: float = field(
        default=90.0,
        metadata={
            "help": "days by which the clock may be ahead of the last run and the newest judgment"
        },
    )
