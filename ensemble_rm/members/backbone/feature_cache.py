"""Pooled features on disk: each text is read by a trunk once.

The key covers all that a feature depends on: the weights' digest, the dtype, the tokens after
template and truncation, layer and pooling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.members.backbone.pooling import Rule
from ensemble_rm.members.backbone.trunk import Trunk, View
from ensemble_rm.members.backbone.vector_store import VectorStore
from ensemble_rm.members.encoding import Encoded
from ensemble_rm.progress import Progress, silent

DEFAULT_MAX_BYTES = 4 * 2**30
_CHUNK = 256  # samples read at once: what memory holds, and what an interruption can cost


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
    """Return what each view reads of each sample: `features_in_parts`, put together.

    Returns
    -------
    ndarray
        (n_samples, n_views, width) float32.
    """
    out = np.empty((len(encoded), len(views), _width(trunk, views)), dtype=np.float32)
    for rows, found in features_in_parts(trunk, encoded, views, cache=cache, progress=progress):
        out[rows] = found
    return out


def features_in_parts(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield what each view reads, some samples at a time; equal samples are read once.

    Parameters
    ----------
    trunk : Trunk
    encoded : sequence of Encoded
    views : sequence of View
    cache : FeatureCache, optional
        Looked into before the trunk runs, and filled as it runs.
    progress : callable
        Called with ("reading", done, total), in different samples.

    Yields
    ------
    rows : ndarray of int
        Of these samples; each comes once.
    features : ndarray
        (len(rows), n_views, width) float32; twice the trunk's width where a view reads both
        poolings, and then views of one pooling end in zeros.
    """
    parts = tuple(dict.fromkeys(part for view in views for part in view.parts()))
    for rows, read in _read(trunk, encoded, parts, cache, progress):
        out = np.zeros((len(rows), len(views), _width(trunk, views)), dtype=np.float32)
        for i, view in enumerate(views):
            columns = [read[:, parts.index(part)] for part in view.parts()]
            out[:, i, : trunk.width * len(columns)] = np.concatenate(columns, axis=1)
        yield rows, out


def _width(trunk: Trunk, views: Sequence[View]) -> int:
    return trunk.width * max(len(view.parts()) for view in views)


def _read(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    parts: Sequence[tuple[int, Rule]],
    cache: FeatureCache | None,
    progress: Progress,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows and their (len(rows), n_parts, width): what is kept first, then what is read."""
    model = f"{trunk.backbone.digest}|{trunk.options.dtype}"
    rows: dict[bytes, list[int]] = {}
    for row, e in enumerate(encoded):
        rows.setdefault(text_digest(e, model=model), []).append(row)
    keys: dict[bytes, list[bytes]] = {}
    kept = {}
    if cache is not None:
        marks = [f"{layer}:{rule}".encode() for layer, rule in parts]
        keys = {text: [hashlib.sha256(text + mark).digest() for mark in marks] for text in rows}
        known = cache.get([key for own in keys.values() for key in own])
        for text, own in keys.items():
            found = [known[key] for key in own if key in known]
            if len(found) == len(own) and all(vector.shape == (trunk.width,) for vector in found):
                kept[text] = np.stack(found)
    if kept:
        yield _spread([rows[text] for text in kept], np.stack(list(kept.values())))
    missing = {own[0]: text for text, own in rows.items() if text not in kept}
    done = 0
    for chosen in _chunks(encoded, list(missing)):
        pooled = trunk.pooled(
            [encoded[row] for row in chosen],
            parts,
            progress=lambda stage, n, _, done=done: progress(stage, done + n, len(missing)),  # type: ignore[misc]
        )
        texts = [missing[row] for row in chosen]
        if cache is not None:
            wanted = [key for text in texts for key in keys[text]]
            cache.put(wanted, pooled.reshape(len(wanted), trunk.width))
        done += len(chosen)
        yield _spread([rows[text] for text in texts], pooled)


def _chunks(encoded: Sequence[Encoded], rows: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows into lists of one to two `_CHUNK`, longest first, that part few prompts' rows."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        e = encoded[row]
        prompts.setdefault(tuple(e.ids[: e.start]), []).append(row)
    chunk: list[int] = []
    for own in sorted(prompts.values(), key=lambda own: -max(len(encoded[row].ids) for row in own)):
        for i in range(0, len(own), _CHUNK):
            chunk += own[i : i + _CHUNK]
            if len(chunk) >= _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _spread(
    rows: Sequence[Sequence[int]], read: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return every row of each text, and what was read of it."""
    counts = [len(own) for own in rows]
    return np.concatenate([np.asarray(own) for own in rows]), np.repeat(read, counts, axis=0)
