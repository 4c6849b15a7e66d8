"""Token states of a trunk in a memory-mapped file: the inputs that branches are trained on.

The file contains the states of all samples, one sample after another, in the trunk's dtype. Its
name is a digest of everything that the states depend on: weights, dtype, layer, and tokens.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.errors import StorageError
from ensemble_rm.members.backbone.checkpoint import torch_dtype
from ensemble_rm.members.backbone.feature_cache import text_digest
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.batching import Batch, batches, collate
from ensemble_rm.progress import Progress, silent

DEFAULT_MAX_BYTES = 16 * 2**30
_log = logging.getLogger(__name__)


def states_bytes(encoded: Sequence[Encoded], *, width: int, dtype: str) -> int:
    """Return the size of samples' token states on disk, in bytes."""
    return sum(len(e.ids) for e in encoded) * width * torch_dtype(dtype).itemsize


class TokenStates:
    """Token states of samples, read from a memory-mapped file.

    Parameters
    ----------
    trunk : Trunk
        Computed the states.
    encoded : sequence of Encoded
        The samples; `batch` takes their indices.
    path : Path, optional
        Path of the file; None if branches share no block, so that they need no states.
    """

    def __init__(self, trunk: Trunk, encoded: Sequence[Encoded], path: Path | None) -> None:
        self.trunk, self.encoded, self.path = trunk, list(encoded), path
        self.lengths: NDArray[np.int64] = np.array([len(e.ids) for e in encoded], dtype=np.int64)
        self._begins = np.cumsum(self.lengths) - self.lengths
        self._flat = None
        if path is not None:
            self._flat = _map(path, int(self.lengths.sum()), trunk, writing=False)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return 0 if self._flat is None else self._flat.nbytes

    def take(self, rows: NDArray[np.int64]) -> TokenStates:
        """Return some of the samples; the file is shared."""
        taken = copy.copy(self)
        taken.encoded = [self.encoded[row] for row in rows]
        taken.lengths, taken._begins = self.lengths[rows], self._begins[rows]
        return taken

    def batch(self, rows: Sequence[int]) -> tuple[Batch, torch.Tensor | None]:
        """Return a padded batch of samples and their states, (B, T, width); None without a file."""
        batch = collate(self.encoded, list(rows), device=self.trunk.device)
        if self._flat is None:
            return batch, None
        states = torch.zeros(*batch.ids.shape, self.trunk.width, dtype=self._flat.dtype)
        for i, row in enumerate(rows):
            begin, length = int(self._begins[row]), int(self.lengths[row])
            states[i, :length] = self._flat[begin : begin + length]
        return batch, states.to(self.trunk.device)


def _map(path: Path, tokens: int, trunk: Trunk, *, writing: bool) -> torch.Tensor:
    dtype = torch_dtype(trunk.options.dtype)
    # A shared mapping writes to the file; a private one never does.
    try:
        flat = torch.from_file(str(path), shared=writing, size=tokens * trunk.width, dtype=dtype)
    except RuntimeError as error:
        raise StorageError(f"the token states {path} cannot be mapped: {error}") from error
    states: torch.Tensor = flat.view(tokens, trunk.width)
    return states


def states_path(
    trunk: Trunk, encoded: Sequence[Encoded], folder: Path, *, top: int | None = None
) -> Path:
    """Return the path of samples' token states after block `top` (default: the trunk's top)."""
    top = trunk.top if top is None else top
    model = f"{trunk.backbone.digest}|{trunk.options.dtype}|{top}"
    digest = hashlib.sha256()
    for e in encoded:
        digest.update(text_digest(e, model=model))
    return folder.expanduser() / f"states-{digest.hexdigest()[:32]}.bin"


def token_states(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    folder: Path,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    progress: Progress = silent,
) -> TokenStates:
    """Run the trunk over samples once and store the states of every token.

    Parameters
    ----------
    trunk : Trunk
    encoded : sequence of Encoded
    folder : Path
        Folder of the file; a file of the same states is reused.
    max_bytes : int
        Maximum size of the file, and of all such files in the folder.
    progress : callable
        Called with ("reading", done, total), in samples.

    Returns
    -------
    TokenStates
        Without a file if the trunk ends below its first block.

    Raises
    ------
    StorageError
        If the states exceed `max_bytes` or the free disk space; nothing is written.
        If the file cannot be mapped.
    """
    if trunk.top == 0:
        return TokenStates(trunk, encoded, None)
    size = states_bytes(encoded, width=trunk.width, dtype=trunk.options.dtype)
    path = states_path(trunk, encoded, folder)
    if path.exists() and path.stat().st_size == size:
        path.touch()  # the least recently used file is deleted first
        return TokenStates(trunk, encoded, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, size, max_bytes=max_bytes, samples=len(encoded))
    _log.info("token states of %d samples: %.2f GB in %s", len(encoded), size / 1e9, path)
    # Written under another name first, so that an interrupted run leaves no incomplete file.
    scratch = path.with_suffix(f".{os.getpid()}.new")
    try:
        _write(trunk, encoded, scratch, progress)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return TokenStates(trunk, encoded, path)


def _make_room(folder: Path, size: int, *, max_bytes: int, samples: int) -> None:
    """Delete the least recently used files until `size` bytes fit."""
    files = sorted(folder.glob("states-*.bin"), key=lambda file: file.stat().st_mtime)
    sizes = [file.stat().st_size for file in files]
    free = shutil.disk_usage(folder).free
    if size > min(max_bytes, free + sum(sizes)):
        raise StorageError(
            f"the token states of {samples} samples need {size / 1e9:.2f} GB; the limit is "
            f"{max_bytes / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free; use fewer "
            "pairs, a shorter max_length, dtype='bfloat16', or a larger states_limit"
        )
    used = sum(sizes)
    for file, file_size in zip(files, sizes, strict=True):
        if used + size <= max_bytes and size <= free:
            return
        file.unlink(missing_ok=True)
        used, free = used - file_size, free + file_size


def _write(trunk: Trunk, encoded: Sequence[Encoded], path: Path, progress: Progress) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(e.ids) for e in encoded])])
    flat = _map(path, int(offsets[-1]), trunk, writing=True)
    done = 0
    for batch in batches(encoded, token_budget=trunk.token_budget, device=trunk.device):
        states = trunk.states(batch).cpu()
        for row, padded, length in zip(batch.rows, states, batch.lengths.tolist(), strict=True):
            flat[int(offsets[row]) : int(offsets[row]) + length] = padded[:length]
        done += len(batch.rows)
        progress("reading", done, len(encoded))
