"""Tokens of members and judges that other servers run: read from the environment, never saved."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.members.scorer import Scorer


def read_token(variable: str | None) -> str | None:
    """Return the token that an environment variable holds; None where none is named.

    Raises
    ------
    OptionError
        If it is not set.
    """
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):
        raise OptionError(f"the environment variable {variable}, which holds a token, is not set")
    return token


def with_tokens(ensemble: RewardEnsemble) -> RewardEnsemble:
    """Return an ensemble whose remote members have the tokens that they name."""
    scorers = tuple(map(_with_token, ensemble.scorers))
    changed = any(new is not old for new, old in zip(scorers, ensemble.scorers, strict=True))
    return replace(ensemble, scorers=scorers) if changed else ensemble


def _with_token(scorer: Scorer) -> Scorer:
    if scorer.token_variable is not None:
        return scorer.with_token(read_token(scorer.token_variable))
    return scorer
