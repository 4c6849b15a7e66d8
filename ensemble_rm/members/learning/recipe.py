"""What the recipes of all kinds of members share; each kind's own recipe lies in its folder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ensemble_rm.errors import OptionError
from ensemble_rm.field_help import with_field_help

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.checkpoint import Backbone
    from ensemble_rm.members.encoding import Encoded

Rules = dict[str, tuple[bool, str]]
"""By a field's name: whether its value can be used, and what it must be."""
NOT_SAVED = {"saved": False}  # metadata of fields that change how a run is done, not its result


@with_field_help
@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How members of one kind are trained: an immutable record, saved with the ensemble."""

    kind: ClassVar[str]

    epochs: int = field(
        default=150,
        metadata={"help": "maximum number of epochs; early stopping may end training sooner"},
    )
    patience: int = field(
        default=10,
        metadata={"help": "epochs without a better validation NLL after which a member stops"},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of AdamW"})
    batch_size: int = field(default=64, metadata={"help": "preference pairs per step"})
    clip: float = field(default=1.0, metadata={"help": "maximum norm of a member's gradient"})
    smoothing: float = field(default=0.0, metadata={"help": "label smoothing ε, in [0, 1)"})
    centring: float = field(
        default=0.0,
        metadata={"help": "coefficient of (chosen + rejected)², which keeps scores near 0"},
    )
    bootstrap: bool = field(
        default=False,
        metadata={"help": "whether each member trains on its own resample of the prompts"},
    )

    def __post_init__(self) -> None:
        for name, (valid, wanted) in self._rules().items():
            if not valid:
                raise OptionError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

    def _rules(self) -> Rules:
        """Return the rule of each field that not every value of its type satisfies."""
        return {
            "epochs": (self.epochs >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a finite number > 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "clip": (self.clip > 0, "> 0"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "centring": (0 <= self.centring < math.inf, "a finite number ≥ 0"),
        }

    @abstractmethod
    def resolve(self, backbone: Backbone, members: int) -> Self:
        """Return the recipe with everything filled in that depends on the backbone.

        Parameters
        ----------
        backbone : Backbone
        members : int
            Number of members.

        Raises
        ------
        OptionError
            If a field does not fit the backbone or the number of members.
        """

    def settings(self) -> dict[str, Any]:
        """Return what scorers made by a resolved recipe `describe`: the same where both fit."""
        return {}

    def states_bytes(
        self,
        backbone: Backbone,  # noqa: ARG002 - of kinds that keep token states
        encoded: Sequence[Encoded],  # noqa: ARG002
        *,
        dtype: str,  # noqa: ARG002
    ) -> int:
        """Return the bytes of token states that training by a resolved recipe keeps on disk."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields that decide the result, as JSON values."""
        saved = (f.name for f in fields(self) if f.metadata.get("saved", True))
        values = ((name, getattr(self, name)) for name in saved)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> Self:
        """Read the recipe that an ensemble's provenance records.

        Parameters
        ----------
        provenance : mapping
            Of an ensemble that `train` made. Ensembles of older versions are read too: their
            ``"recipe"`` has the fields of all kinds, and views and blocks stand next to it.
        """
        values = dict(provenance["recipe"])
        if "views" in provenance:  # saved when one recipe served all kinds
            values = cls._upgraded(provenance)
        return cls(**values)

    @classmethod
    def _upgraded(cls, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return this kind's fields from provenance in the older format."""
        flat = {**provenance["recipe"], **provenance}
        return {f.name: flat[f.name] for f in fields(cls) if f.name in flat}


@with_field_help
@dataclass(frozen=True, kw_only=True)
class FineTuningRecipe(Recipe):
    """What recipes share that train a transformer's own layers."""

    batch_size: int = 16
    weight_decay: float = field(
        default=0.01, metadata={"help": "weight decay of AdamW, decoupled from the gradient"}
    )
    warmup: float = field(
        default=0.1,
        metadata={
            "help": "share of all steps over which the learning rate rises; then it falls to 0 "
            "linearly"
        },
    )
    # Noise on the two sides of a pair is noise on its margin: off, as in TRL.
    dropout: float | None = field(
        default=0.0,
        metadata={"help": "dropout of the model's layers, attention included; none keeps its own"},
    )

    def _rules(self) -> Rules:
        return super()._rules() | {
            # Several are tried for heads alone.
            "weight_decay": (_is_finite(self.weight_decay), "one finite number ≥ 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "dropout": (self.dropout is None or 0 <= self.dropout < 1, "None or in [0, 1)"),
        }

    @classmethod
    def _upgraded(cls, provenance: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._upgraded(provenance)
        (values["weight_decay"],) = values["weight_decay"]  # was a list, of one value here
        return values


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def as_texts(values: object) -> Any:
    """Return strings or objects as a tuple of strings: ``"4:last"`` is one; None stays None."""
    if values is None:
        return None
    return (values,) if isinstance(values, str) else tuple(map(str, values))  # type: ignore[call-overload]
