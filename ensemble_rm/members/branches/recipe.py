"""How `branch` members are trained, and what the recipes of `branch` and `lora` members share.

References
----------
.. [1] Kumar et al. 2022, arXiv 2202.10054: linear probing, then fine-tuning.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, get_args

from ensemble_rm.errors import OptionError
from ensemble_rm.field_help import with_field_help
from ensemble_rm.members.learning.recipe import NOT_SAVED, FineTuningRecipe, Rules, as_texts

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.checkpoint import Backbone
    from ensemble_rm.members.encoding import Encoded

FirstHead: TypeAlias = Literal["zero", "fitted"]


@with_field_help
@dataclass(frozen=True, kw_only=True)
class BranchedRecipe(FineTuningRecipe):
    """What the recipes of `branch` and `lora` members share: k versions of a trunk's top blocks."""

    epochs: int = 4
    patience: int = 2
    views: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "how each member's last states are pooled, DEPTH:POOLING such as 30:last; one "
            "for all or one per member (default: both poolings)"
        },
    )
    blocks: int | None = field(
        default=None,
        metadata={"help": "number of top blocks that each member has of its own"},
    )
    subspace: float = field(
        default=1.0,
        metadata={"help": "share of the pooled states that each head sees, drawn at random"},
    )
    # A fitted head [1] already knows its training pairs and leaves the blocks little to learn
    # from them; but a member that training cannot better keeps that fit.
    first_head: FirstHead = field(
        default="zero",
        metadata={
            "help": "where heads start: from zero, or from their fit on the pretrained blocks"
        },
    )
    head_rate: float = field(
        default=10.0,
        metadata={"help": "learning rate of the heads, relative to that of the blocks"},
    )
    states_limit: int = field(
        default=16 * 2**30,
        metadata={"help": "maximum size of the token states on disk, in bytes"} | NOT_SAVED,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", as_texts(self.views))
        super().__post_init__()

    def _rules(self) -> Rules:
        return super()._rules() | {
            "subspace": (0 < self.subspace <= 1, "in (0, 1]"),
            "first_head": (self.first_head in get_args(FirstHead), f"one of {get_args(FirstHead)}"),
            "head_rate": (0 < self.head_rate < math.inf, "a finite number > 0"),
        }

    @abstractmethod
    def _block_range(self, depth: int) -> tuple[int, int]:
        """Return the default number of blocks and the largest, for a model of some depth."""

    def resolve(self, backbone: Backbone, members: int) -> Self:
        """Return the recipe with the number of blocks, and one view per member."""
        from ensemble_rm.members.backbone.checkpoint import read_shape
        from ensemble_rm.members.backbone.trunk import View, views_per_member

        depth, _ = read_shape(backbone)
        default, most = self._block_range(depth)
        blocks = default if self.blocks is None else self.blocks
        if not 1 <= blocks <= most:
            more = "; kind 'full' copies them all" if most < depth else ""
            raise OptionError(
                f"blocks must lie between 1 and {most} for {backbone.name}, not {blocks}{more}"
            )
        texts = (str(View(depth, "both")),) if self.views is None else self.views
        views = views_per_member(texts, members, depth=depth, name=backbone.name)
        for view in views:
            if view.layer != depth:
                raise OptionError(
                    f"view {view}: a {self.kind} member is read after its last block, "
                    f"{depth}:{view.pooling}"
                )
        return replace(self, views=tuple(map(str, views)), blocks=blocks)

    def states_bytes(self, backbone: Backbone, encoded: Sequence[Encoded], *, dtype: str) -> int:
        """Return the size of the token states below the members' blocks; 0 where nothing is."""
        from ensemble_rm.members.backbone.checkpoint import read_shape
        from ensemble_rm.members.backbone.token_states import states_bytes

        depth, width = read_shape(backbone)
        return 0 if self.blocks == depth else states_bytes(encoded, width=width, dtype=dtype)

    def settings(self) -> dict[str, Any]:
        """Return views and blocks."""
        return {"views": list(self.views or ()), "blocks": self.blocks}


@with_field_help
@dataclass(frozen=True, kw_only=True)
class BranchRecipe(BranchedRecipe):
    """How copies of a trunk's top blocks are trained, each with a head."""

    kind: ClassVar[str] = "branch"

    blocks: int | None = field(
        default=None,
        metadata={"help": "number of top blocks that each member copies (default: 2)"},
    )
    reinitialise: int = field(
        default=0,
        metadata={"help": "number of each branch's topmost blocks that start from fresh weights"},
    )

    def _rules(self) -> Rules:
        return super()._rules() | {"reinitialise": (self.reinitialise >= 0, "≥ 0")}

    def _block_range(self, depth: int) -> tuple[int, int]:
        return 2, depth - 1
