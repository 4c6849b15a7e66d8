"""Small heads on pooled states as arrays, and the features and verdicts that they are fitted to.

A head is a matrix product in float64; knows nothing of trunks or text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from ensemble_rm.errors import StorageError
from ensemble_rm.file_modes import follow_umask

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeadWeights:
    """k heads of one shape.

    A head standardises what its view reads, z = (x − offset)·gain, and returns w·z + b, or
    w·silu(V z + c) + b where it has a hidden layer. A feature outside a head's random subspace
    has gain 0.

    Attributes
    ----------
    offset, gain : ndarray, shape (k, width)
    weight : ndarray, shape (k, width) or (k, hidden)
    bias : ndarray, shape (k,)
    inner : ndarray, shape (k, width, hidden), optional
    inner_bias : ndarray, shape (k, hidden), optional
    """

    offset: Floats
    gain: Floats
    weight: Floats
    bias: Floats
    inner: Floats | None = None
    inner_bias: Floats | None = None

    def __call__(self, member: int, x: NDArray[np.float32]) -> Floats:
        """Score (n, width) features with one head: (n,)."""
        z: Floats = (x.astype(np.float64) - self.offset[member]) * self.gain[member]
        if self.inner is not None and self.inner_bias is not None:
            hidden = z @ self.inner[member] + self.inner_bias[member]
            z = hidden * expit(hidden)
        return np.asarray(z @ self.weight[member] + self.bias[member], dtype=np.float64)

    def tensors(self) -> dict[str, Floats]:
        """Return the arrays by name."""
        return {name: a for name, a in vars(self).items() if a is not None}

    def save(self, folder: Path) -> None:
        """Write ``heads.safetensors``."""
        arrays = {name: np.ascontiguousarray(a) for name, a in self.tensors().items()}
        save_file(arrays, folder / "heads.safetensors")
        follow_umask(folder / "heads.safetensors")

    @classmethod
    def load(cls, folder: Path) -> HeadWeights:
        """Read what `save` wrote.

        Raises
        ------
        StorageError
            If the file is missing or damaged.
        """
        path = folder / "heads.safetensors"
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise StorageError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class PairFeatures:
    """Features and verdicts of preference pairs.

    Attributes
    ----------
    features : ndarray, shape (2·n_pairs, n_views, width)
        Every chosen sample, then every rejected one.
    targets, weights, margins : ndarray, shape (n_pairs,)
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair.
    """

    features: NDArray[np.float32]
    targets: NDArray[np.float64]
    weights: NDArray[np.float64]
    margins: NDArray[np.float64]
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class HeadsResult:
    """Trained heads.

    Attributes
    ----------
    weights : HeadWeights
    chosen : tuple of float
        The weight decay, or the prior, that each member chose.
    validation_nll : tuple of float
        Each member's, raw.
    history : list of dict
        An epoch each, the training loss and validation NLL of every member's chosen lane; or a
        prior each, the validation NLL of every member.
    """

    weights: HeadWeights
    chosen: tuple[float, ...]
    validation_nll: tuple[float, ...]
    history: list[dict[str, Any]] = field(default_factory=list)
