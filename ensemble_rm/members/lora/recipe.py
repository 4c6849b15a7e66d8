"""How `lora` members are trained, and the shape of their adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ensemble_rm.errors import OptionError
from ensemble_rm.field_help import with_field_help
from ensemble_rm.members.branches.recipe import BranchedRecipe
from ensemble_rm.members.learning.recipe import Rules, as_texts


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The shape of an adapter, as a saved member records it; `LoraRecipe` has the defaults.

    Attributes
    ----------
    rank : int
        Rank of the weights' update, B·A.
    alpha : float
        The update is scaled by alpha/rank.
    targets : tuple of str
        The linear layers that are adapted, by the ends of their names, such as ``"q_proj"``;
        empty for all of the blocks' linear layers.
    dropout : float
        Of an adapter's input, in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        rules = {
            "rank": (self.rank >= 1, "at least 1"),
            "alpha": (0 < self.alpha < math.inf, "a finite number > 0"),
            "dropout": (0 <= self.dropout < 1, "in [0, 1)"),
        }
        for name, (valid, wanted) in rules.items():
            if not valid:
                raise OptionError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


@with_field_help
@dataclass(frozen=True, kw_only=True)
class LoraRecipe(BranchedRecipe):
    """How LoRA adapters on a trunk's blocks are trained, each with a head."""

    kind: ClassVar[str] = "lora"

    learning_rate: float = 2e-4
    blocks: int | None = field(
        default=None,
        metadata={"help": "number of top blocks that are adapted (default: all)"},
    )
    rank: int = field(default=16, metadata={"help": "rank of an adapter's update"})
    alpha: float = field(
        default=32.0, metadata={"help": "scale of an adapter's update, which is alpha/rank"}
    )
    targets: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "linear layers that are adapted, by the ends of their names, such as q_proj "
            "(default: all)"
        },
    )
    adapter_dropout: float = field(
        default=0.0, metadata={"help": "dropout of the adapters' inputs in training"}
    )
    warm_start: bool = field(
        default=False,
        metadata={
            "help": "whether one adapter is fitted first and merged into the blocks, and all "
            "members start from there"
        },
    )
    diversity: float = field(
        default=0.0,
        metadata={
            "help": "coefficient of a term that keeps the adapters apart: k − ‖M‖⁎, where the "
            "rows of M are the members' updates at unit length"
        },
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_texts(self.targets))
        super().__post_init__()
        self.adapter  # noqa: B018 - checks rank, alpha and targets

    def _rules(self) -> Rules:
        return super()._rules() | {
            "adapter_dropout": (0 <= self.adapter_dropout < 1, "in [0, 1)"),
            "diversity": (0 <= self.diversity < math.inf, "a finite number ≥ 0"),
        }

    def _block_range(self, depth: int) -> tuple[int, int]:
        return depth, depth

    @property
    def adapter(self) -> LoraOptions:
        """The shape of each adapter."""
        return LoraOptions(self.rank, self.alpha, self.targets, self.adapter_dropout)

    def settings(self) -> dict[str, Any]:
        """Return views, blocks and the adapters' shape."""
        return super().settings() | {"lora": asdict(self.adapter)}

    @classmethod
    def _upgraded(cls, provenance: Mapping[str, Any]) -> dict[str, Any]:
        shape = dict(provenance["lora"])
        shape["adapter_dropout"] = shape.pop("dropout")
        return super()._upgraded(provenance) | shape
