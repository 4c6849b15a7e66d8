"""A report on the three kinds of drift, each with its own result; they are never combined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ensemble_rm.drift.labelled import LabelledDrift
from ensemble_rm.drift.raters import RaterDrift
from ensemble_rm.drift.unlabelled import UnlabelledDrift
from ensemble_rm.saved_json import as_object, at, from_row

KINDS: tuple[str, ...] = ("labelled", "unlabelled", "raters")


@dataclass(frozen=True)
class DriftReport:
    """The result of one check.

    Attributes
    ----------
    at : str
        Date or name of the check; reports are plotted in this order.
    labelled : LabelledDrift, optional
        Whether the temperature still fits the verdicts.
    unlabelled : UnlabelledDrift, optional
        Whether scores are distributed as at publication.
    raters : RaterDrift, optional
        Whether the anchor set is still judged as before.
    unavailable : dict of str to str
        Reason per missing kind.
    """

    at: str
    labelled: LabelledDrift | None = None
    unlabelled: UnlabelledDrift | None = None
    raters: RaterDrift | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def alarms(self) -> tuple[str, ...]:
        """The kinds that alarm, of ``"labelled"``, ``"unlabelled"`` and ``"raters"``."""
        return tuple(
            name for name in KINDS if (kind := getattr(self, name)) is not None and kind.alarm
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        kinds = {name: getattr(self, name) for name in KINDS}
        rows = {name: None if kind is None else kind.to_json() for name, kind in kinds.items()}
        return {"at": self.at, **rows, "unavailable": self.unavailable}

    @classmethod
    def from_json(cls, d: Any) -> DriftReport:
        """Read what `to_json` wrote, else `SchemaError`."""
        values = as_object(d)
        # Each kind by its own reader, which knows older reports.
        kinds: tuple[Any, ...] = (LabelledDrift, UnlabelledDrift, RaterDrift)
        for name, kind in zip(KINDS, kinds, strict=True):
            if values.get(name) is not None:
                with at(name):
                    values[name] = kind.from_json(values[name])
        return from_row(cls, values)
