"""Which of the stored judgments are meant: a window of time, and named fields."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.judgments.judgment import as_utc

Names: TypeAlias = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class JudgmentFilter:
    """Which judgments are meant; all of them where nothing is given.

    Attributes
    ----------
    since, until : datetime, optional
        Judged at or after the one, before the other; with time zones.
    source, batch, policy, subset, annotator, strategy : str or tuple of str, optional
        Only those of this name, or of one of these.
    with_corrected : bool
        Also the judgments that a correction replaced: the history.

    Raises
    ------
    OptionError
        If a bound has no time zone, or the window is empty.
    """

    since: datetime | None = None
    until: datetime | None = None
    source: Names = None
    batch: Names = None
    policy: Names = None
    subset: Names = None
    annotator: Names = None
    strategy: Names = None
    with_corrected: bool = False

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            bound = getattr(self, name)
            if bound is not None:
                try:
                    object.__setattr__(self, name, as_utc(bound))
                except DataError as error:
                    raise OptionError(f"{name}: {error}") from None
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise OptionError(f"the window from {self.since} until {self.until} is empty")

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The named fields that are restricted, each to its names."""
        fields = ("source", "batch", "policy", "subset", "annotator", "strategy")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return {
            k: (value,) if isinstance(value, str) else tuple(value) for k, value in given.items()
        }


EVERYTHING = JudgmentFilter()
