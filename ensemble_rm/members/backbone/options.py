"""Options of a backbone: template, truncation, dtype, device, batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from ensemble_rm.errors import OptionError

Template: TypeAlias = Literal["auto", "chat", "pair", "plain"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TrunkOptions:
    """How a trunk reads text and computes.

    Attributes
    ----------
    template : {"auto", "chat", "pair", "plain"}
        How prompt and completion become one text; ``"auto"`` chooses by the tokenizer.
    max_length : int
        Maximum length of a sequence in tokens.
    dtype : {"float32", "bfloat16", "float16"}
        Dtype of the trunk's weights and states; pooling and heads use float32 or float64.
    device : str, optional
        Name of the device (default: the best available).
    token_budget : int, optional
        Padded tokens per batch (default: derived from the model and the device).
    share_prefix : bool
        Whether each prompt is read once for all its completions, if the model has a key–value
        cache.
    """

    template: Template = field(
        default="auto",
        metadata={"help": "how prompt and completion become one text"},
    )
    max_length: int = field(
        default=512, metadata={"help": "maximum length of a sequence", "metavar": "TOKENS"}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the backbone's weights",
            "choices": DTYPES,
        },
    )
    device: str | None = field(
        default=None,
        metadata={"help": "device: cpu, cuda or mps", "metavar": "NAME", "shown": "the best"},
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "padded tokens of a batch",
            "metavar": "TOKENS",
            "shown": "from model and device",
        },
    )
    share_prefix: bool = field(
        default=True, metadata={"help": "read each prompt once for all its completions"}
    )

    def __post_init__(self) -> None:
        if self.template not in get_args(Template):
            raise OptionError(
                f"template must be one of {get_args(Template)}, not {self.template!r}"
            )
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype must be one of {DTYPES}, not {self.dtype!r}")
        if self.max_length < 1 or (self.token_budget is not None and self.token_budget < 1):
            raise OptionError(
                f"max_length and token_budget must be at least 1, not {self.max_length} and "
                f"{self.token_budget}"
            )
