"""Pooled features on disk: each text is read by a trunk once.

The key covers all that a feature depends on: the weights' digest, the dtype, the tokens after
template and truncation, layer and pooling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.members.pooling import Rule
from ensemble_rm.members.store import VectorStore
from ensemble_rm.members.text import Encoded
from ensemble_rm.members.trunk import Progress, Trunk, View, silent

DEFAULT_MAX_BYTES = 4 * 2**30
_CHUNK = 256  # samples read between two writes: what an interruption can cost


class FeatureCache(VectorStore):
    """A bounded store of float32 features under byte keys.

    Parameters
    ----------
    folder : Path
        Where ``features.sqlite`` lies; made where missing.
    max_bytes : int
        Of vectors; the oldest are forgotten beyond it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        super().__init__(folder, name="features", dtype="<f4", max_bytes=max_bytes)


def text_digest(encoded: Encoded, *, model: str) -> bytes:
    """Digest of a model and the tokens it reads."""
    digest = hashlib.sha256(model.encode())
    digest.update(np.asarray([encoded.start, *encoded.ids], dtype="<i8").tobytes())
    if encoded.types is not None:
        digest.update(np.asarray(encoded.types, dtype="<i8").tobytes())
    return digest.digest()


def features(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Return what each view reads of each sample; equal samples are read once.

    Parameters
    ----------
    trunk : Trunk
    encoded : sequence of Encoded
    views : sequence of View
    cache : FeatureCache, optional
        Looked into before the trunk runs, and filled as it runs.
    progress : callable
        Called with ("reading", done, total), in different samples.

    Returns
    -------
    ndarray
        (n_samples, n_views, width) float32; twice the trunk's width where a view reads both
        poolings, and then views of one pooling end in zeros.
    """
    parts = tuple(dict.fromkeys(part for view in views for part in view.parts()))
    read = _read(trunk, encoded, parts, cache, progress)
    doubled = any(len(view.parts()) > 1 for view in views)
    out = np.zeros((len(encoded), len(views), trunk.width * (1 + doubled)), dtype=np.float32)
    for i, view in enumerate(views):
        columns = [read[:, parts.index(part)] for part in view.parts()]
        out[:, i, : trunk.width * len(columns)] = np.concatenate(columns, axis=1)
    return out


def _read(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    parts: Sequence[tuple[int, Rule]],
    cache: FeatureCache | None,
    progress: Progress,
) -> NDArray[np.float32]:
    model = f"{trunk.backbone.digest}|{trunk.options.dtype}"
    texts = [text_digest(e, model=model) for e in encoded]
    first: dict[bytes, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    known: dict[bytes, NDArray[np.float32]] = {}
    marks = [f"{layer}:{rule}".encode() for layer, rule in parts]
    if cache is not None:
        wanted = [hashlib.sha256(text + mark).digest() for text in first for mark in marks]
        known = cache.get(wanted)
    missing = []
    by_text: dict[bytes, NDArray[np.float32]] = {}
    for text, row in first.items():
        found = [known.get(hashlib.sha256(text + mark).digest()) for mark in marks]
        if any(vector is None or vector.shape != (trunk.width,) for vector in found):
            missing.append(row)
        else:
            by_text[text] = np.stack([v for v in found if v is not None])
    missing.sort(key=lambda row: -len(encoded[row].ids))  # longest first, as batches want it
    for i in range(0, len(missing), _CHUNK):
        rows = missing[i : i + _CHUNK]
        pooled = trunk.pooled(
            [encoded[row] for row in rows],
            parts,
            progress=lambda stage, done, _, i=i: progress(stage, i + done, len(missing)),  # type: ignore[misc]
        )
        if cache is not None:
            keys = [hashlib.sha256(texts[row] + mark).digest() for row in rows for mark in marks]
            cache.put(keys, pooled.reshape(len(keys), trunk.width))
        by_text.update((texts[row], pooled[j]) for j, row in enumerate(rows))
    if not encoded:
        return np.empty((0, len(parts), trunk.width), dtype=np.float32)
    return np.stack([by_text[text] for text in texts])
