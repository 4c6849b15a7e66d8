"""Mahalanobis distance of an input from the training inputs, on a model's features.

Features are standardised first, so that no layer or unit counts more by its scale. The covariance
is shrunk towards a multiple of the identity by Ledoit and Wolf's share [2]_. Only its leading
directions are kept; all other directions share one variance, the mean of theirs. That is exact
where all directions are kept, and needs no full matrix where samples are fewer than features.

References
----------
.. [1] Lee et al. 2018, arXiv 1807.03888: the Mahalanobis distance as a detector; here without
   classes, which preferences do not have.
.. [2] Ledoit & Wolf 2004, J. Multivariate Analysis 88: a well-conditioned estimator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import DataError, NonFiniteScoreError, OptionError

DIRECTIONS = 256
MIN_SAMPLES = 50


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Mean, scale and shrunk covariance of the training features.

    Attributes
    ----------
    mean, scale : ndarray, shape (n_features,)
        Of each feature; a constant feature has scale 1.
    directions : ndarray, shape (n_directions, n_features)
        Orthonormal, in standardised features, by decreasing variance.
    variances : ndarray, shape (n_directions,)
        Shrunk variance of each direction, > 0.
    rest : float
        Shrunk variance in every other direction; 0 where there is none.
    """

    mean: Floats
    scale: Floats
    directions: Floats
    variances: Floats
    rest: float

    def distance(self, features: ArrayLike) -> Floats:
        """Return each sample's distance, divided by √n_features: about 1 on training inputs.

        Parameters
        ----------
        features : array_like, shape (n_samples, n_features)

        Returns
        -------
        ndarray, shape (n_samples,)

        Raises
        ------
        OptionError
            If the number of features differs from that of the training features.
        """
        x = _matrix(features)
        if x.shape[1] != len(self.mean):
            raise OptionError(f"{x.shape[1]} features for a feature space of {len(self.mean)}")
        z = (x - self.mean) / self.scale
        # Scores along the leading directions, shape (n_samples, n_directions).
        along = z @ self.directions.T
        squared = (along**2 / self.variances).sum(axis=1)
        if self.rest > 0:
            # Pythagoras: what the leading directions leave over, without the full matrix.
            outside = (z**2).sum(axis=1) - (along**2).sum(axis=1)
            squared += np.maximum(outside, 0.0) / self.rest
        return np.asarray(np.sqrt(squared / len(self.mean)), dtype=np.float64)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name, as they are stored."""
        arrays = {name: np.atleast_1d(value) for name, value in vars(self).items()}
        return arrays | {"directions": self.directions.astype(np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> FeatureSpace:
        """Read what `arrays` returned."""
        wide = arrays["directions"].astype(np.float64)
        return cls(**{**arrays, "directions": wide, "rest": arrays["rest"].item()})


def fit_feature_space(features: ArrayLike, *, directions: int = DIRECTIONS) -> FeatureSpace:
    """Describe the training features by mean, scale and shrunk covariance.

    Parameters
    ----------
    features : array_like, shape (n_samples, n_features)
        Features of the members' training inputs.
    directions : int
        Maximum number of directions to keep.

    Returns
    -------
    FeatureSpace

    Raises
    ------
    DataError
        If there are fewer than 50 samples.
    NonFiniteScoreError
        If a feature is NaN or infinite.
    """
    x = _matrix(features)
    n, d = x.shape
    if n < MIN_SAMPLES:
        raise DataError(f"{n} samples; a feature space needs at least {MIN_SAMPLES}")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # A constant feature gets scale 1: its deviations count as they are.
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    z = (x - mean) / scale
    # The SVD of (n, d) costs n·d·min(n, d); the covariance's eigenvectors are its rows.
    _, singular, rows = np.linalg.svd(z, full_matrices=False)
    spectrum = singular**2 / n  # the covariance's eigenvalues; further ones, up to d, are 0
    share, centre = _shrinkage(z, spectrum), float(spectrum.sum() / d)
    shrunk = (1 - share) * spectrum + share * centre
    kept = min(directions, len(spectrum))
    # Directions without variance cannot divide.
    kept -= int((shrunk[:kept] <= 0).sum())
    others = d - kept
    total = float(shrunk[kept:].sum()) + share * centre * (d - len(spectrum))
    rest = total / others if others else 0.0
    # Stored as float32: rounding now makes a saved and loaded space identical.
    rounded = rows[:kept].astype(np.float32).astype(np.float64)
    return FeatureSpace(mean, scale, rounded, shrunk[:kept], rest)


def _matrix(features: ArrayLike) -> Floats:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape[1:]:
        raise OptionError(f"features must be a (n_samples, n_features) matrix, not {x.shape}")
    if not np.isfinite(x).all():
        raise NonFiniteScoreError("features hold NaN or infinity")
    return x


def _shrinkage(z: Floats, spectrum: Floats) -> float:
    """Return Ledoit and Wolf's share of the identity [2]_ for centred samples (n, d)."""
    n, d = z.shape
    centre = spectrum.sum() / d
    # Sums of squared matrix entries, without building the (d, d) matrix.
    # ‖S − μI‖², from the eigenvalues.
    spread = float((spectrum**2).sum()) - d * centre**2
    fourth = float(((z**2).sum(axis=1) ** 2).mean())
    noise = (fourth - float((spectrum**2).sum())) / n
    # Equal eigenvalues: the identity is the best estimate.
    return float(np.clip(noise / spread, 0.0, 1.0)) if spread > 0 else 1.0
