"""A cache of pooled features on disk, so that a trunk reads each text once.

The key covers everything that a feature depends on: the weights' digest, the dtype, the tokens
after template and truncation, the layer and the pooling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.members.backbone.vector_store import VectorStore
from ensemble_rm.members.encoding import Encoded

DEFAULT_MAX_BYTES = 4 * 2**30


class FeatureCache(VectorStore):
    """A bounded store of float32 features.

    Parameters
    ----------
    folder : Path
        Folder of ``features.sqlite``; created if missing.
    max_bytes : int
        Maximum size of the vectors; beyond it, the oldest are deleted.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        super().__init__(folder, name="features", dtype="<f4", max_bytes=max_bytes)

    def find(
        self,
        model: str,
        texts: Mapping[int, Encoded],
        parts: Sequence[tuple[int, str]],
        width: int,
    ) -> dict[int, NDArray[np.float32]]:
        """Return the features of those texts of which every part is stored.

        Parameters
        ----------
        model : str
            Identifies the weights and the dtype.
        texts : mapping of int to Encoded
            By row.
        parts : sequence of (int, str)
            Layers and pooling rules.
        width : int
            Number of features of a part; a vector of another width counts as missing.

        Returns
        -------
        dict of int to ndarray, shape (n_parts, width)
            By row.
        """
        keys = {row: _keys(model, text, parts) for row, text in texts.items()}
        stored = self.get([key for row_keys in keys.values() for key in row_keys])
        features = {}
        for row, row_keys in keys.items():
            vectors = [stored[key] for key in row_keys if key in stored]
            if len(vectors) == len(row_keys) and all(
                vector.shape == (width,) for vector in vectors
            ):
                features[row] = np.stack(vectors)
        return features

    def add(
        self,
        model: str,
        texts: Sequence[Encoded],
        parts: Sequence[tuple[int, str]],
        features: NDArray[np.float32],
    ) -> None:
        """Store the (n_texts, n_parts, width) features of texts."""
        keys = [key for text in texts for key in _keys(model, text, parts)]
        self.put(keys, features.reshape(len(keys), -1))


def text_digest(encoded: Encoded, *, model: str) -> bytes:
    """Return a digest of a model and the tokens of a text."""
    digest = hashlib.sha256(model.encode())
    digest.update(np.asarray([encoded.start, *encoded.ids], dtype="<i8").tobytes())
    if encoded.types is not None:
        digest.update(np.asarray(encoded.types, dtype="<i8").tobytes())
    return digest.digest()


def _keys(model: str, text: Encoded, parts: Sequence[tuple[int, str]]) -> list[bytes]:
    """Return one key per part."""
    digest = text_digest(text, model=model)
    return [hashlib.sha256(digest + f"{layer}:{rule}".encode()).digest() for layer, rule in parts]
