"""What every kind of member is trained from, and what training returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Preferences
from ensemble_rm.members.backbone.checkpoint import Backbone
from ensemble_rm.members.backbone.token_states import DEFAULT_MAX_BYTES
from ensemble_rm.members.backbone.trunk import TrunkOptions, View
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.lora.adapters import LoraOptions
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.progress import Progress, silent


@dataclass(frozen=True)
class Job:
    """One training run, all options resolved.

    Attributes
    ----------
    fit, validation : Preferences
    backbone : Backbone
    seeds : list of dict
        Each member's, by purpose.
    views : tuple of View
        What each member reads.
    blocks : int
        How many top blocks a branch copies, or an adapter changes.
    options : TrunkOptions
    recipe : Recipe
    digest : str
        Of all that the result depends on.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    cache_folder : Path, optional
        Of features and token states.
    states_limit : int
        Largest size of the token states on disk, in bytes.
    lora : LoraOptions
        What an adapter is.
    warm_start : bool
        Whether adapters start from blocks that one adapter of all has fitted to the task.
    start : tuple of Scorer
        Whose weights the members go on from; empty where they start afresh.
    trainer_args : mapping
        More of transformers' TrainingArguments.
    callbacks : sequence
        Of transformers' Trainer.
    progress : callable
    """

    fit: Preferences
    validation: Preferences
    backbone: Backbone
    seeds: list[dict[str, int]]
    views: tuple[View, ...]
    blocks: int
    options: TrunkOptions
    recipe: Recipe
    digest: str
    checkpoint: Path | None
    cache_folder: Path | None
    states_limit: int = DEFAULT_MAX_BYTES
    lora: LoraOptions = field(default_factory=LoraOptions)
    warm_start: bool = False
    start: tuple[Scorer, ...] = ()
    trainer_args: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    progress: Progress = silent

    def named(self, part: str) -> Progress:
        """Return a progress whose stages name a part of the data."""
        return lambda stage, done, total: self.progress(f"{stage} {part}", done, total)


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
    """

    scorers: tuple[Scorer, ...]
    reference: NDArray[np.float64]
    truncation: Truncation
    record: dict[str, Any]
    features: NDArray[np.float64] | None = None
