"""Raw scores on disk: each sample is scored by a member once.

The key covers all that a score depends on: the member's identity and the sample's text. Beside the
scores stands what truncation cut, so that its count stays true. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample, prompt_json
from ensemble_rm.members.backbone.vector_store import VectorStore
from ensemble_rm.members.encoding import Truncation

DEFAULT_MAX_BYTES = 2**30
_OVERHEAD = 128  # bytes of an entry's key, its index and its row

Floats = NDArray[np.float64]


class ScoreCache(VectorStore):
    """A bounded store of members' raw scores, which several processes may share.

    Parameters
    ----------
    folder : str or Path
        Where ``scores.sqlite`` lies; made where missing.
    max_bytes : int
        About the file's size; the oldest scores are forgotten beyond it.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        super().__init__(
            Path(folder), name="scores", dtype="<f8", max_bytes=max_bytes, overhead=_OVERHEAD
        )

    def scores(
        self,
        member: str,
        samples: Sequence[Sample],
        compute: Callable[[Sequence[Sample]], tuple[Floats, Truncation]],
    ) -> tuple[Floats, Truncation]:
        """Return a scorer's scores, computing those that are not here.

        Parameters
        ----------
        member : str
            The scorer's digest.
        samples : sequence of Sample
            At least one.
        compute : callable
            Called once with the samples that are not here, each once; not at all if all are.

        Returns
        -------
        scores : ndarray, shape (n_samples, n_members)
        truncation : Truncation
        """
        keys = [_key(member, sample) for sample in samples]
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        known = self.get(list(first))
        missing = [key for key in first if key not in known]
        if missing:
            found, cut = compute([samples[first[key]] for key in missing])
            vectors = np.column_stack([found, cut.prompts, cut.completions])
            scored = np.flatnonzero(~np.isnan(found).any(axis=1))  # a failure is tried again
            self.put([missing[i] for i in scored], vectors[scored])
            known.update(zip(missing, vectors, strict=True))
        rows = np.stack([known[key] for key in keys])  # (n_samples, n_members + 2)
        return rows[:, :-2], Truncation(rows[:, -2] > 0, rows[:, -1] > 0)


def _key(member: str, sample: Sample) -> bytes:
    text = json.dumps([member, prompt_json(sample.prompt), sample.completion])
    return hashlib.sha256(text.encode()).digest()
