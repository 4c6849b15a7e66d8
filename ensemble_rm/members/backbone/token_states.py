"""Token states of a trunk on disk, memory-mapped: what branches are trained on.

One flat file, each sample's states one after another, in the trunk's dtype. Its name is a digest of
all that the states depend on: weights, dtype, layer, and the tokens in their order.
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
        That made the states.
    encoded : sequence of Encoded
        The samples, whose numbers `batch` takes.
    path : Path, optional
        Of the file; None under branches that share no block, which need no states.
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
        """Return some of the samples over the same file."""
        found = copy.copy(self)
        found.encoded = [self.encoded[row] for row in rows]
        found.lengths, found._begins = self.lengths[rows], self._begins[rows]
        return found

    def batch(self, rows: Sequence[int]) -> tuple[Batch, torch.Tensor | None]:
        """Return the padded batch of some samples and their states, (B, T, width), if any."""
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
    try:
        flat = torch.from_file(str(path), shared=writing, size=tokens * trunk.width, dtype=dtype)
    except RuntimeError as error:
        raise StorageError(f"the token states {path} cannot be mapped: {error}") from error
    states: torch.Tensor = flat.view(tokens, trunk.width)
    return states


def states_path(
    trunk: Trunk, encoded: Sequence[Encoded], folder: Path, *, top: int | None = None
) -> Path:
    """Return the file of samples' token states after block `top`, the trunk's where not given."""
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
    """Run the trunk over samples once and keep the states of every token.

    Parameters
    ----------
    trunk : Trunk
    encoded : sequence of Encoded
    folder : Path
        Of the file; one that is there already is used.
    max_bytes : int
        Largest file that may be written.
    progress : callable
        Called with ("reading", done, total), in samples.

    Returns
    -------
    TokenStates
        Without a file where the trunk ends below its first block.

    Raises
    ------
    StorageError
        If the states would outgrow `max_bytes` or the disk; nothing is written then.
        If the file cannot be mapped.
    """
    if trunk.top == 0:
        return TokenStates(trunk, encoded, None)
    size = states_bytes(encoded, width=trunk.width, dtype=trunk.options.dtype)
    path = states_path(trunk, encoded, folder)
    if path.exists() and path.stat().st_size == size:
        path.touch()
        return TokenStates(trunk, encoded, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, size, max_bytes=max_bytes, samples=len(encoded))
    _log.info("token states of %d samples: %.2f GB in %s", len(encoded), size / 1e9, path)
    scratch = path.with_suffix(f".{os.getpid()}.new")
    try:
        _write(trunk, encoded, scratch, progress)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return TokenStates(trunk, encoded, path)


def _make_room(folder: Path, size: int, *, max_bytes: int, samples: int) -> None:
    """Forget the files that were used longest ago until `size` bytes fit under the cap."""
    there = sorted(folder.glob("states-*.bin"), key=lambda file: file.stat().st_mtime)
    sizes = [file.stat().st_size for file in there]
    free = shutil.disk_usage(folder).free
    if size > min(max_bytes, free + sum(sizes)):
        raise StorageError(
            f"the token states of {samples} samples need {size / 1e9:.2f} GB; allowed are "
            f"{max_bytes / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: give fewer "
            "pairs, a shorter max_length, dtype='bfloat16', or a larger states_limit"
        )
    held = sum(sizes)
    for file, its in zip(there, sizes, strict=True):
        if held + size <= max_bytes and size <= free:
            return
        file.unlink(missing_ok=True)
        held, free = held - its, free + its


def _write(trunk: Trunk, encoded: Sequence[Encoded], path: Path, progress: Progress) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(e.ids) for e in encoded])])
    flat = _map(path, int(offsets[-1]), trunk, writing=True)
    done = 0
    for batch in batches(encoded, token_budget=trunk.token_budget, device=trunk.device):
        states = trunk.states(batch).cpu()
        for row, one, length in zip(batch.rows, states, batch.lengths.tolist(), strict=True):
            flat[int(offsets[row]) : int(offsets[row]) + length] = one[:length]
        done += len(batch.rows)
        progress("reading", done, len(encoded))
