"""Selecting judgments: by time, and by named fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.judgments.judgment import as_utc

Names: TypeAlias = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class TimeRange:
    """A range of time, half-open.

    Attributes
    ----------
    since, until : datetime, optional
        Start (included) and end (excluded), with time zones; None for no bound.
    """

    since: datetime | None = field(
        default=None, metadata={"help": "only judgments made at or after this time"}
    )
    until: datetime | None = field(
        default=None, metadata={"help": "only judgments made before this time"}
    )


@dataclass(frozen=True, kw_only=True)
class JudgmentFilter(TimeRange):
    """Selects judgments; without arguments, all current ones.

    Attributes
    ----------
    since, until : datetime, optional
        Judged at or after, and before; with time zones.
    source, batch, policy, subset, annotator, strategy : str or tuple of str, optional
        Only judgments with this name, or one of these names.
    without_annotator : str or tuple of str, optional
        No judgments by these annotators.
    with_corrected : bool
        Include judgments that a correction has replaced: the whole history.

    Raises
    ------
    OptionError
        If a bound has no time zone, or the range is empty.
    """

    source: Names = field(default=None, metadata={"help": "only judgments of this source"})
    batch: Names = field(default=None, metadata={"help": "only judgments of this batch"})
    policy: Names = field(default=None, metadata={"help": "only completions of this policy"})
    subset: Names = field(default=None, metadata={"help": "only judgments of this subset"})
    annotator: Names = field(default=None, metadata={"help": "only judgments by this annotator"})
    strategy: Names = field(
        default=None, metadata={"help": "only pairs that were selected by this strategy"}
    )
    without_annotator: Names = field(
        default=None, metadata={"help": "no judgments by this annotator"}
    )
    with_corrected: bool = field(
        default=False, metadata={"help": "include judgments that a correction has replaced"}
    )

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            bound = getattr(self, name)
            if bound is not None:
                try:
                    object.__setattr__(self, name, as_utc(bound))
                except DataError as error:
                    raise OptionError(f"{name}: {error}") from None
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise OptionError(f"the range from {self.since} until {self.until} is empty")

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The restricted fields, each with the names to keep."""
        fields = ("source", "batch", "policy", "subset", "annotator", "strategy")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return {
            k: (value,) if isinstance(value, str) else tuple(value) for k, value in given.items()
        }

    @property
    def excluded(self) -> tuple[str, ...]:
        """The annotators whose judgments are left out."""
        names = self.without_annotator or ()
        return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True, kw_only=True)
class JobSelection(TimeRange):
    """Which judgments a job may read.

    Attributes
    ----------
    exclude_annotator : tuple of str
        Annotators whose judgments are left out.
    only_source : tuple of str
        Sources to read; all by default.
    since, until
        See `TimeRange`.
    """

    exclude_annotator: tuple[str, ...] = field(
        default=(), metadata={"help": "annotator whose judgments are left out; repeatable"}
    )
    only_source: tuple[str, ...] = field(
        default=(), metadata={"help": "source to read, all others are left out; repeatable"}
    )

    def filter(self) -> JudgmentFilter:
        """Return the selection of judgments."""
        return JudgmentFilter(
            since=self.since,
            until=self.until,
            source=self.only_source or None,
            without_annotator=self.exclude_annotator or None,
        )


ALL_JUDGMENTS = JudgmentFilter()
