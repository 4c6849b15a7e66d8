"""How a backbone reads text and computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Template: TypeAlias = Literal["auto", "chat", "pair", "plain"]


@dataclass(frozen=True, slots=True)
class TrunkOptions:
    """How a trunk reads text and computes.

    Attributes
    ----------
    template : {"auto", "chat", "pair", "plain"}
    max_length : int
        Maximum length of a sequence in tokens.
    dtype : {"float32", "bfloat16", "float16"}
        Of the trunk's weights and states; pooling and heads are float32 or better.
    device : str, optional
        The best available one by default.
    token_budget : int, optional
        Padded tokens in a batch; derived from the model and its device by default.
    share_prefix : bool
        Read each prompt once for all its completions, where the model keeps a cache.
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
            "choices": ("float32", "bfloat16", "float16"),
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
