"""How `full` members are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ensemble_rm.field_help import with_field_help
from ensemble_rm.members.learning.recipe import NOT_SAVED, FineTuningRecipe

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.checkpoint import Backbone


@with_field_help
@dataclass(frozen=True, kw_only=True)
class FullRecipe(FineTuningRecipe):
    """How copies of a whole model are fine-tuned, by transformers' Trainer."""

    kind: ClassVar[str] = "full"

    epochs: int = 3
    patience: int = 1
    learning_rate: float = 3e-5
    trainer_args: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "more of transformers' TrainingArguments, by name: trackers, FSDP, DeepSpeed"
        }
        | NOT_SAVED,
    )
    callbacks: tuple[Any, ...] = field(
        default=(), metadata={"help": "callbacks of transformers' Trainer"} | NOT_SAVED
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "callbacks", tuple(self.callbacks))
        super().__post_init__()

    def resolve(self, backbone: Backbone, members: int) -> Self:  # noqa: ARG002
        """Return the recipe: nothing in it depends on the backbone."""
        return self
