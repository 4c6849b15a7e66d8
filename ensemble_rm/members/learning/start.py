"""The scorer that training continues from."""

from __future__ import annotations

from typing import TypeVar

from ensemble_rm.members.model_scorer import ModelScorer
from ensemble_rm.members.scorer import Scorer

Kept = TypeVar("Kept", bound=ModelScorer)


def only(start: tuple[Scorer, ...], kind: type[Kept]) -> Kept | None:
    """Return the one scorer that members of a trunk start from; None where they start afresh."""
    if not start:
        return None
    (scorer,) = start
    assert isinstance(scorer, kind)
    return scorer
