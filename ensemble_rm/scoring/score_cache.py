"""Raw scores on disk: a member scores each sample once.

The key covers all that a score depends on: the member's digest and the sample's text. What
truncation cut is stored with the scores, so that its count stays true.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ensemble_rm.data.samples import Sample, prompt_json
from ensemble_rm.members.backbone.vector_store import VectorStore
from ensemble_rm.members.scorer import MemberScores, Truncation

DEFAULT_MAX_BYTES = 2**30
_OVERHEAD = 128  # bytes of an entry's key, its index and its row


class ScoreCache(VectorStore):
    """A bounded store of members' raw scores, which several processes may share.

    Parameters
    ----------
    folder : str or Path
        Folder of ``scores.sqlite``; created if missing.
    max_bytes : int
        Approximate maximum size of the file; beyond it, the oldest scores are deleted.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        super().__init__(
            Path(folder), name="scores", dtype="<f8", max_bytes=max_bytes, overhead=_OVERHEAD
        )

    def scores(
        self,
        member: str,
        samples: Sequence[Sample],
        compute: Callable[[Sequence[Sample]], MemberScores],
    ) -> MemberScores:
        """Return a scorer's scores, computing those that are not stored.

        Parameters
        ----------
        member : str
            The scorer's digest.
        samples : sequence of Sample
        compute : callable
            Called once with the samples that are not stored, each once; not at all if all are.

        Returns
        -------
        MemberScores
            Without features.
        """
        if not samples:
            return compute(samples)
        keys = [_key(member, sample) for sample in samples]
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        known = self.get(list(first))
        missing = [key for key in first if key not in known]
        errors: dict[bytes, Exception] = {}
        if missing:
            new = compute([samples[first[key]] for key in missing])
            cut = new.truncation
            vectors = np.column_stack([new.scores, cut.prompts, cut.completions])
            scored = np.flatnonzero(~np.isnan(new.scores).any(axis=1))  # a failure is tried again
            self.put([missing[i] for i in scored], vectors[scored])
            known.update(zip(missing, vectors, strict=True))
            errors = {missing[i]: error for i, error in new.errors.items()}
        rows = np.stack([known[key] for key in keys])  # (n_samples, n_members + 2)
        return MemberScores(
            rows[:, :-2],
            Truncation(rows[:, -2] > 0, rows[:, -1] > 0),
            errors={row: errors[key] for row, key in enumerate(keys) if key in errors},
        )


def _key(member: str, sample: Sample) -> bytes:
    text = json.dumps([member, prompt_json(sample.prompt), sample.completion])
    return hashlib.sha256(text.encode()).digest()
