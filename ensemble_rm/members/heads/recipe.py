"""How `head` members are trained: solved to their optimum, or by Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

from ensemble_rm.errors import OptionError
from ensemble_rm.field_help import with_field_help
from ensemble_rm.members.learning.recipe import Recipe, Rules, as_texts

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.checkpoint import Backbone

Solver: TypeAlias = Literal["convex", "adam"]
_OF_ADAM = ("epochs", "patience", "learning_rate", "weight_decay", "batch_size", "clip")


@with_field_help
@dataclass(frozen=True, kw_only=True)
class HeadRecipe(Recipe):
    """How heads over one frozen trunk are trained.

    Linear heads are solved to their optimum, which only `prior` and the data decide. With
    ``solver="adam"``, or a hidden layer, they are trained by Adam with early stopping, and seeds
    make heads of one view differ a little.
    """

    kind = "head"

    views: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "what each head reads, LAYER:POOLING such as 16:mean; one for all or one per "
            "member (default: spread over the upper half of the layers)"
        },
    )
    solver: Solver = field(
        default="convex",
        metadata={"help": "how linear heads are fitted: to their optimum, or by Adam"},
    )
    prior: tuple[float, ...] = field(
        default=(0.45, 0.65, 0.93, 1.35, 2.0),
        metadata={
            "help": "prior standard deviations of a typical margin, in logits, that the convex "
            "solver tries; each head keeps the one with the best validation NLL"
        },
    )
    weight_decay: tuple[float, ...] = field(
        default=(1.0, 10.0, 100.0),
        metadata={
            "help": "decoupled weight decays that Adam tries; each head keeps the one with the "
            "best validation NLL"
        },
    )
    subspace: float = field(
        default=1.0,
        metadata={"help": "share of the features that each head sees, drawn at random per head"},
    )
    hidden: int = field(
        default=0, metadata={"help": "width of a hidden layer in each head; 0 is a linear head"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", as_texts(self.views))
        object.__setattr__(self, "weight_decay", tuple(float(w) for w in self.weight_decay))
        object.__setattr__(self, "prior", tuple(float(t) for t in self.prior))
        super().__post_init__()
        if self.is_convex:
            for own in fields(self):
                if own.name in _OF_ADAM and getattr(self, own.name) != own.default:
                    raise OptionError(
                        f"{own.name}={getattr(self, own.name)!r} belongs to solver='adam'; linear "
                        "heads are solved to their optimum, which only `prior` and the data decide"
                    )

    def _rules(self) -> Rules:
        return super()._rules() | {
            "solver": (self.solver in get_args(Solver), f"one of {get_args(Solver)}"),
            "prior": (
                bool(self.prior) and all(0 < t < math.inf for t in self.prior),
                "one or more finite numbers > 0",
            ),
            "weight_decay": (
                bool(self.weight_decay) and all(0 <= w < math.inf for w in self.weight_decay),
                "one or more finite numbers ≥ 0",
            ),
            "subspace": (0 < self.subspace <= 1, "in (0, 1]"),
            "hidden": (self.hidden >= 0, "≥ 0"),
        }

    @property
    def is_convex(self) -> bool:
        """Whether the heads are linear and solved."""
        return self.solver == "convex" and not self.hidden

    def resolve(self, backbone: Backbone, members: int) -> Self:
        """Return the recipe with one view per member."""
        from ensemble_rm.members.backbone.checkpoint import read_shape
        from ensemble_rm.members.backbone.trunk import default_views, views_per_member

        depth, _ = read_shape(backbone)
        views = (
            default_views(depth, members)
            if self.views is None
            else views_per_member(self.views, members, depth=depth, name=backbone.name)
        )
        return replace(self, views=tuple(map(str, views)))

    def settings(self) -> dict[str, Any]:
        """Return the views."""
        return {"views": list(self.views or ())}
