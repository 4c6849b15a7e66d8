"""Small heads on pooled states, as arrays: what heads and branches both end in.

A matrix product in float64; knows nothing of trunks or text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import expit

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

    @classmethod
    def load(cls, folder: Path) -> HeadWeights:
        """Read what `save` wrote."""
        return cls(**load_file(folder / "heads.safetensors"))
