"""What a kind's training function takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Preferences
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.checkpoint import Backbone
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.scorer import Scorer, Truncation
from ensemble_rm.progress import Progress, silent

R = TypeVar("R", bound=Recipe)
S = TypeVar("S", bound=Scorer)


@dataclass(frozen=True)
class Job(Generic[R]):
    """One training run, all options resolved.

    Attributes
    ----------
    fit, validation : Preferences
    backbone : Backbone
    seeds : list of dict
        Each member's seeds, by purpose: `member_seeds`.
    options : TrunkOptions
    recipe : Recipe
        Resolved, so that nothing in it is left to the backbone.
    digest : str
        Of all that the result depends on.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    cache_folder : Path, optional
        Of features and token states.
    start : tuple of Scorer
        Scorers of the same kind that training continues from; empty for a fresh start.
    progress : callable
        Called with (stage, done, total).
    """

    fit: Preferences
    validation: Preferences
    backbone: Backbone
    seeds: list[dict[str, int]]
    options: TrunkOptions
    recipe: R
    digest: str
    checkpoint: Path | None = None
    cache_folder: Path | None = None
    start: tuple[Scorer, ...] = ()
    progress: Progress = silent

    def only_start(self, kind: type[S]) -> S:
        """Return the scorer that training continues from, of members that share one trunk.

        Raises
        ------
        OptionError
            If there is not exactly one scorer: then there is not one trunk.
        """
        if len(self.start) != 1 or not isinstance(self.start[0], kind):
            names = [type(scorer).__name__ for scorer in self.start]
            raise OptionError(f"start: expected a single {kind.__name__}, not {names}")
        return self.start[0]


@dataclass(frozen=True, eq=False)
class Trained:
    """Members fresh from training.

    Attributes
    ----------
    scorers : tuple of Scorer
    reference : ndarray, shape (2·n_validation, n_members)
        Raw scores of the validation samples: every chosen one, then every rejected one.
    truncation : Truncation
        Of the training samples.
    record : dict
        What provenance keeps of the run.
    features : ndarray, shape (n_samples, n_features), optional
        Of some training samples, where the members expose features.
    in_checkpoint : bool
        Whether the scorers read their weights from the job's checkpoint folder.
    """

    scorers: tuple[Scorer, ...]
    reference: NDArray[np.float64]
    truncation: Truncation
    record: dict[str, Any]
    features: NDArray[np.float64] | None = None
    in_checkpoint: bool = False
