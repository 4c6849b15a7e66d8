"""Scores at the publication of a version, with which later batches are compared.

Stores samples instead of summaries, because later tests permute prompts between then and now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ensemble_rm.arrays import Floats
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.errors import DataError, NonFiniteScoreError, OptionError, StorageError
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.saved_json import read_saved
from ensemble_rm.uncertainty.distance import FeatureSpace

FORMAT = 1
MIN_PROMPTS = 20
MAX_PROMPTS = 1000
PER_PROMPT = 8


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """Scored samples, prompt by prompt.

    Attributes
    ----------
    reward : ndarray, shape (n_samples,)
        Normalised, aggregated.
    members : ndarray, shape (n_samples, n_members)
        Normalised scores.
    groups : ndarray of int, shape (n_samples,)
        Prompt of each, 0 … n_prompts − 1.
    distance : ndarray, shape (n_samples,), optional
        To the training features.
    """

    reward: Floats
    members: Floats
    groups: NDArray[np.int64]
    distance: Floats | None = None

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return int(self.groups.max()) + 1 if len(self.groups) else 0

    @classmethod
    def read(
        cls,
        scores: Scores,
        prompts: Sequence[str | int] | NDArray[np.int64],
        distance: ArrayLike | None = None,
    ) -> ScoredSet:
        """Check an ensemble's scores and number their prompts.

        Raises
        ------
        OptionError
            If the lengths differ.
        NonFiniteScoreError
            If a score is not finite.
        DataError
            If there are fewer than 20 prompts.
        """
        far = None if distance is None else np.asarray(distance, dtype=np.float64)
        if len(prompts) != len(scores.reward) or (far is not None and len(far) != len(prompts)):
            raise OptionError(
                f"{len(prompts)} prompts and {'no' if far is None else len(far)} distances for "
                f"{len(scores.reward)} scores"
            )
        if not (np.isfinite(scores.reward).all() and np.isfinite(scores.members).all()):
            raise NonFiniteScoreError("scores contain NaN or infinity; drop those samples")
        number: dict[str, int] = {}
        names = (str(prompt) for prompt in prompts)
        groups = np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)
        if len(number) < MIN_PROMPTS:
            raise DataError(
                f"scores of {len(number)} prompts; a test of their shift needs {MIN_PROMPTS}"
            )
        return cls(scores.reward, scores.members, groups, far)

    def thinned(self, *, prompts: int, per_prompt: int, seed: int) -> ScoredSet:
        """Return a random subset of at most `prompts` prompts, `per_prompt` samples of each."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.groups))
        rank = np.empty(len(order), dtype=np.int64)  # of a sample among those of its prompt
        # A stable sort of shuffled rows: the order within each prompt is random.
        sorted_rows = order[np.argsort(self.groups[order], kind="stable")]
        counts = np.bincount(self.groups)
        rank[sorted_rows] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = rng.permutation(self.prompts)[:prompts]
        rows = np.flatnonzero((rank < per_prompt) & np.isin(self.groups, kept))
        # Renumbered without gaps, because `prompts` is the largest number plus 1.
        groups = np.unique(self.groups[rows], return_inverse=True)[1].astype(np.int64)
        far = None if self.distance is None else self.distance[rows]
        return ScoredSet(self.reward[rows], self.members[rows], groups, far)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays, keyed by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference of one version.

    Attributes
    ----------
    names : tuple of str
        The members.
    samples : ScoredSet
        Their scores of a reference set.
    space : FeatureSpace, optional
        Of the training features, where a scorer exposes features.
    """

    names: tuple[str, ...]
    samples: ScoredSet
    space: FeatureSpace | None = None

    @classmethod
    def of(
        cls,
        scores: Scores,
        prompts: Sequence[str | int] | NDArray[np.int64],
        *,
        space: FeatureSpace | None = None,
        features: ArrayLike | None = None,
        seed: int = 0,
    ) -> Reference:
        """Keep the scores of a reference set.

        Parameters
        ----------
        scores : Scores
            Of completions that the policy writes at publication, not used in training.
        prompts : sequence of (str or int), shape (n_samples,)
            Prompt of each sample. At most 1,000 prompts are kept, and 8 samples of each.
        space : FeatureSpace, optional
            Of the training features.
        features : array_like, shape (n_samples, n_features), optional
            Of the reference set; needed with `space`.
        seed : int
            Of the draw.

        Returns
        -------
        Reference

        Raises
        ------
        OptionError
            If lengths differ, or one of space and features is missing.
        NonFiniteScoreError, DataError
            See `ScoredSet.read`.
        """
        if (space is None) != (features is None):
            raise OptionError("give both space and features of the reference set, or neither")
        far = None if space is None or features is None else space.distance(features)
        samples = ScoredSet.read(scores, prompts, far)
        kept = samples.thinned(prompts=MAX_PROMPTS, per_prompt=PER_PROMPT, seed=seed)
        return cls(scores.names, kept, space)

    def save(self, folder: str | Path) -> Path:
        """Write ``reference.json`` and ``reference.safetensors`` into a folder.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        arrays = self.samples.arrays()
        if self.space is not None:
            arrays |= {f"space.{name}": a for name, a in self.space.arrays().items()}
        row = {"format": FORMAT, "names": list(self.names), "features": self.space is not None}
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            tensors = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
            save_file(tensors, path / "reference.safetensors")
            follow_umask(path / "reference.safetensors")
            text = json.dumps(row, indent=1, ensure_ascii=False)
            (path / "reference.json").write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path} cannot be written: {error}") from error
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Reference:
        """Read what `save` wrote.

        Raises
        ------
        StorageError
            If the folder contains no reference, or a damaged one.
        """
        path = Path(folder)
        try:
            row = read_saved(_ReferenceRow, path / "reference.json")
            if row.format != FORMAT:
                raise StorageError(f"{path} has format {row.format}; this reads {FORMAT}")
            arrays = load_file(path / "reference.safetensors")
            own = {name: a for name, a in arrays.items() if not name.startswith("space.")}
            parts = {name[6:]: a for name, a in arrays.items() if name.startswith("space.")}
            space = FeatureSpace.from_arrays(parts) if row.features else None
            return cls(row.names, ScoredSet(**own), space)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, StorageError) as error:
            raise StorageError(f"{path} contains no reference: {error}") from error


@dataclass(frozen=True, slots=True)
class _ReferenceRow:
    """The content of ``reference.json``."""

    format: int
    names: tuple[str, ...]
    features: bool
