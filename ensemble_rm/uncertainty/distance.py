"""How far an input lies from the training inputs, by a model's features: Mahalanobis distance.

The covariance is shrunk towards a multiple of the identity by Ledoit and Wolf's share [2]_, on
features that are standardised first, so that neither layers nor units weigh more by their scale.
Its leading directions are kept, the rest of the space has one variance, their mean: what is left
of the shrunk covariance where there are fewer samples than features, and exact where all are kept.

Knows arrays of features; knows nothing of models or texts.

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
    """Where the training features lie.

    Attributes
    ----------
    mean, scale : ndarray, shape (n_features,)
        Of the training features; a feature that never varies has scale 1.
    directions : ndarray, shape (n_directions, n_features)
        Orthonormal, in standardised features, of falling variance.
    variances : ndarray, shape (n_directions,)
        Shrunk, > 0.
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
            If the number of features is another.
        """
        x = _matrix(features)
        if x.shape[1] != len(self.mean):
            raise OptionError(f"{x.shape[1]} features, and a space of {len(self.mean)}")
        z = (x - self.mean) / self.scale
        along = z @ self.directions.T
        squared = (along**2 / self.variances).sum(axis=1)
        if self.rest > 0:
            beside = (z**2).sum(axis=1) - (along**2).sum(axis=1)
            squared += np.maximum(beside, 0.0) / self.rest
        return np.asarray(np.sqrt(squared / len(self.mean)), dtype=np.float64)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name, as they are stored."""
        found = {name: np.atleast_1d(value) for name, value in vars(self).items()}
        return found | {"directions": self.directions.astype(np.float32)}

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
        Of inputs that the members were trained on.
    directions : int
        The most that are kept.

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
        raise DataError(f"{n} samples; a feature space needs {MIN_SAMPLES}")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)
    z = (x - mean) / scale
    _, singular, rows = np.linalg.svd(z, full_matrices=False)
    spectrum = singular**2 / n  # of the covariance; what is missing to d is 0
    share, centre = _shrinkage(z, spectrum), float(spectrum.sum() / d)
    shrunk = (1 - share) * spectrum + share * centre
    kept = min(directions, len(spectrum))
    kept -= int((shrunk[:kept] <= 0).sum())
    others = d - kept
    total = float(shrunk[kept:].sum()) + share * centre * (d - len(spectrum))
    rest = total / others if others else 0.0
    # Stored in float32, and rounded here already: a space that was read again is the same.
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
    # Both sums of squares of matrix entries, without the matrix.
    spread = float((spectrum**2).sum()) - d * centre**2
    fourth = float(((z**2).sum(axis=1) ** 2).mean())
    noise = (fourth - float((spectrum**2).sum())) / n
    return float(np.clip(noise / spread, 0.0, 1.0)) if spread > 0 else 1.0
