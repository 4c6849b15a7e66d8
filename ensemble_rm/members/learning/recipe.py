"""What a training run is told, as one immutable record that is saved with its result.

References
----------
.. [1] Kumar et al. 2022, arXiv 2202.10054: linear probing, then fine-tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ensemble_rm.errors import OptionError

Solver: TypeAlias = Literal["convex", "adam"]
FirstHead: TypeAlias = Literal["zero", "fitted"]
_OF_ADAM = ("epochs", "patience", "learning_rate", "weight_decay", "batch_size", "clip")

# Fine-tuning a transformer's own blocks wants other numbers than fitting a head.
_OF_KIND: dict[str, dict[str, Any]] = {
    "head": {},
    "branch": {
        "epochs": 4,
        "patience": 2,
        "learning_rate": 1e-4,
        "weight_decay": (0.01,),
        "batch_size": 16,
    },
    "lora": {
        "epochs": 4,
        "patience": 2,
        "learning_rate": 2e-4,
        "weight_decay": (0.01,),
        "batch_size": 16,
    },
    "full": {
        "epochs": 3,
        "patience": 1,
        "learning_rate": 3e-5,
        "weight_decay": (0.01,),
        "batch_size": 16,
    },
}


@dataclass(frozen=True)
class Recipe:
    """How members are trained; the defaults are those of heads, `of` has those of other kinds.

    Attributes
    ----------
    solver : {"convex", "adam"}
        Of linear heads: their optimum, or Adam with early stopping, under which seeds make heads
        of one view differ a little. A hidden layer, branches and full members know Adam alone.
    prior : tuple of float
        Of the convex solver: standard deviations τ of a typical margin before anything is
        learned, in logits. Every value is tried, and each head keeps the one of the best
        validation NLL.
    epochs : int
        At most; early stopping may end sooner.
    patience : int
        Epochs without a better validation NLL after which a member stops.
    learning_rate : float
        Of AdamW.
    weight_decay : tuple of float
        Decoupled, a step's share is learning_rate·weight_decay. Heads try every value and keep
        the one of the best validation NLL, each member its own.
    batch_size : int
        Pairs a step.
    clip : float
        Largest norm of a member's gradient.
    smoothing : float
        Label smoothing ε.
    centring : float
        Coefficient of the centring term.
    bootstrap : bool
        Give each member its own resample of the training prompts.
    subspace : float
        Share of the features that each linear head sees, drawn anew a head; 1 is all.
    hidden : int
        Width of a head's hidden layer; 0 is a linear head.
    warmup : float
        Share of all steps over which the learning rate of branch, lora and full members rises,
        before it falls to 0 in a straight line; heads keep theirs.
    first_head : {"zero", "fitted"}
        What branch and lora members' heads start from: nothing, or the fit on the blocks as they
        are [1]_. A fitted head knows its training pairs already and leaves the blocks little to
        learn from them; but a member that training cannot better remains that fit.
    head_rate : float
        Learning rate of branch and lora members' heads, over that of their blocks.
    dropout : float, optional
        Of branch, lora and full members' own layers, attention included; None is what the
        pretrained model has. 0 by default: noise on the two sides of a pair is noise on its margin.
    reinitialise : int
        How many of a branch's topmost blocks start from fresh weights, each member's its own.
    diversity : float
        Coefficient of the term that keeps LoRA adapters apart: k − ‖M‖⁎, M the members' updates at
        unit length; 0 is none.
    """

    solver: Solver = "convex"
    prior: tuple[float, ...] = (0.45, 0.65, 0.93, 1.35, 2.0)
    epochs: int = 150
    patience: int = 10
    learning_rate: float = 1e-4
    weight_decay: tuple[float, ...] = (1.0, 10.0, 100.0)
    batch_size: int = 64
    clip: float = 1.0
    smoothing: float = 0.0
    centring: float = 0.0
    bootstrap: bool = False
    subspace: float = 1.0
    hidden: int = 0
    warmup: float = 0.1
    first_head: FirstHead = "zero"
    head_rate: float = 10.0
    dropout: float | None = 0.0
    reinitialise: int = 0
    diversity: float = 0.0

    @classmethod
    def of(cls, kind: str, **changes: Any) -> Recipe:
        """Return the defaults of a kind of member, with changes.

        Parameters
        ----------
        kind : {"head", "branch", "lora", "full"}
        **changes
            Attributes by name.

        Raises
        ------
        OptionError
            If the kind is unknown, or an attribute cannot be used with it.
        """
        recipe = cls(**(_OF_KIND.get(kind, {}) | changes))
        recipe.check(kind)
        return recipe

    @property
    def is_convex(self) -> bool:
        """Whether heads are linear and solved."""
        return self.solver == "convex" and not self.hidden

    def check(self, kind: str) -> None:
        """Refuse what a kind of member cannot do: an `OptionError`."""
        if kind not in _OF_KIND:
            raise OptionError(f"kind must be one of {tuple(_OF_KIND)}, not {kind!r}")
        if kind != "head" and len(self.weight_decay) != 1:
            raise OptionError(
                f"kind {kind!r} takes one weight_decay, not {self.weight_decay}; only heads try "
                f"several (start from Recipe.of({kind!r}))"
            )
        if kind == "head" and self.is_convex:
            plain = Recipe()
            for name in _OF_ADAM:
                if getattr(self, name) != getattr(plain, name):
                    raise OptionError(
                        f"{name}={getattr(self, name)!r} belongs to solver='adam'; linear heads "
                        "are solved to their optimum, which only `prior` and the data decide"
                    )
        if kind != "head" and self.hidden:
            raise OptionError(f"hidden belongs to heads, not to kind {kind!r}")
        if kind == "full" and self.subspace < 1:
            raise OptionError("subspace belongs to heads of their own, which full members have not")
        if kind != "branch" and self.reinitialise:
            raise OptionError(f"reinitialise belongs to kind 'branch', not to {kind!r}")
        if kind != "lora" and self.diversity > 0:
            raise OptionError(
                f"diversity keeps LoRA adapters apart; kind {kind!r} has none, so leave it 0, not "
                f"{self.diversity}"
            )

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_decay", tuple(float(w) for w in self.weight_decay))
        object.__setattr__(self, "prior", tuple(float(t) for t in self.prior))
        rules = {
            "solver": (self.solver in get_args(Solver), f"one of {get_args(Solver)}"),
            "prior": (
                bool(self.prior) and all(0 < t < math.inf for t in self.prior),
                "one or more finite numbers > 0",
            ),
            "epochs": (self.epochs >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a finite number > 0"),
            "weight_decay": (
                bool(self.weight_decay) and all(0 <= w < math.inf for w in self.weight_decay),
                "one or more finite numbers ≥ 0",
            ),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "clip": (self.clip > 0, "> 0"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "centring": (0 <= self.centring < math.inf, "a finite number ≥ 0"),
            "subspace": (0 < self.subspace <= 1, "in (0, 1]"),
            "hidden": (self.hidden >= 0, "≥ 0"),
            "first_head": (self.first_head in get_args(FirstHead), f"one of {get_args(FirstHead)}"),
            "head_rate": (0 < self.head_rate < math.inf, "a finite number > 0"),
            "dropout": (self.dropout is None or 0 <= self.dropout < 1, "None or in [0, 1)"),
            "reinitialise": (self.reinitialise >= 0, "≥ 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "diversity": (0 <= self.diversity < math.inf, "a finite number ≥ 0"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise OptionError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
