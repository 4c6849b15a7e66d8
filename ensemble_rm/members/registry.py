"""The kinds of members: one row per kind; what a row names is imported when it is needed.

To add a kind, write its folder (a scorer; a recipe and a training function where it is trained
here) and add a row. A package of its own calls `register_kind` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.members.learning.job import Job, Trained
    from ensemble_rm.members.learning.recipe import Recipe


@dataclass(frozen=True, slots=True)
class MemberKind:
    """One kind of member.

    Attributes
    ----------
    name : str
        As `train`, recipes and saved ensembles name it; the scorer's `kind`.
    scorer : str
        ``"module:Class"`` of the scorer, which has `save` and `load`.
    recipe : str, optional
        ``"module:Class"`` of the `Recipe`; None for a kind that is not trained here.
    train : str, optional
        ``"module:function"`` that turns a `Job` into `Trained` members.
    former_name : str, optional
        The name that ensembles saved by older versions have.
    """

    name: str
    scorer: str
    recipe: str | None = None
    train: str | None = None
    former_name: str | None = None

    def scorer_class(self) -> Any:
        """Import and return the scorer's class."""
        return _imported(self.scorer)

    def recipe_class(self) -> type[Recipe]:
        """Import and return the recipe's class.

        Raises
        ------
        OptionError
            If members of this kind are not trained here.
        """
        if self.recipe is None:
            raise OptionError(
                f"members of kind {self.name!r} are not trained here; kinds that are: "
                f"{', '.join(trained_kinds())}"
            )
        recipe: type[Recipe] = _imported(self.recipe)
        return recipe

    def trainer(self) -> Callable[[Job[Any]], Trained]:
        """Import and return the training function."""
        if self.train is None:
            raise OptionError(f"kind {self.name!r} has no training function")
        trainer: Callable[[Job[Any]], Trained] = _imported(self.train)
        return trainer


_ROOM = "ensemble_rm.members"
_KINDS: dict[str, MemberKind] = {}


def register_kind(kind: MemberKind) -> None:
    """Add a kind of member.

    Parameters
    ----------
    kind : MemberKind

    Raises
    ------
    OptionError
        If the name is taken by another kind.
    """
    for name in filter(None, (kind.name, kind.former_name)):
        if _KINDS.setdefault(name, kind) != kind:
            raise OptionError(f"there is a kind of member {name!r} already: {_KINDS[name]}")


for _kind in (
    MemberKind(
        "head",
        f"{_ROOM}.heads.scorer:HeadScorer",
        f"{_ROOM}.heads.recipe:HeadRecipe",
        f"{_ROOM}.heads.training:train_heads",
    ),
    MemberKind(
        "branch",
        f"{_ROOM}.branches.scorer:BranchScorer",
        f"{_ROOM}.branches.recipe:BranchRecipe",
        f"{_ROOM}.branches.training:train_branches",
    ),
    MemberKind(
        "lora",
        f"{_ROOM}.lora.scorer:LoraScorer",
        f"{_ROOM}.lora.recipe:LoraRecipe",
        f"{_ROOM}.lora.training:train_lora",
    ),
    MemberKind(
        "full",
        f"{_ROOM}.full.scorer:FullScorer",
        f"{_ROOM}.full.recipe:FullRecipe",
        f"{_ROOM}.full.training:train_full",
        former_name="classifier",
    ),
    MemberKind("implicit", f"{_ROOM}.implicit:ImplicitScorer"),
    MemberKind("remote", f"{_ROOM}.remote.scorer:RemoteScorer"),
    MemberKind("judge", f"{_ROOM}.judges.scorer:JudgeScorer"),
):
    register_kind(_kind)


def member_kind(name: str) -> MemberKind:
    """Return a kind by its name, or by the name that it had in older versions.

    Parameters
    ----------
    name : str

    Returns
    -------
    MemberKind

    Raises
    ------
    OptionError
        If there is no such kind.
    """
    if name not in _KINDS:
        close = get_close_matches(name, _KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"no kind of member {name!r}; kinds: {', '.join(_names())}{hint}")
    return _KINDS[name]


def trained_kinds() -> tuple[str, ...]:
    """Return the names of the kinds that `train` makes.

    Returns
    -------
    tuple of str
    """
    return tuple(name for name in _names() if _KINDS[name].recipe is not None)


def make_recipe(kind: str, **changes: Any) -> Recipe:
    """Return the default recipe of a kind, with changes.

    Parameters
    ----------
    kind : str
    **changes
        Fields of that kind's recipe, by name.

    Returns
    -------
    Recipe
        Of the kind's own class.

    Raises
    ------
    OptionError
        If the kind is unknown, its recipe lacks a field, or a value cannot be used.
    """
    recipe = member_kind(kind).recipe_class()
    known = {own.name for own in fields(recipe)}
    for name in changes:
        if name not in known:
            raise OptionError(f"{name} does not belong to kind {kind!r}{_owners(name)}")
    return recipe(**changes)


def _owners(field_name: str) -> str:
    """Say which kinds' recipes have a field."""
    owners = [
        kind
        for kind in trained_kinds()
        if any(own.name == field_name for own in fields(_KINDS[kind].recipe_class()))
    ]
    return f", but to {' and '.join(map(repr, owners))}" if owners else ""


def _names() -> tuple[str, ...]:
    return tuple(name for name, kind in _KINDS.items() if name == kind.name)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
