"""What a trunk pools of samples, without the reading of equal texts once and without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.members.backbone.trunk import Rule, Trunk
from ensemble_rm.members.encoding import Encoded


def pooled(
    trunk: Trunk, encoded: Sequence[Encoded], parts: Sequence[tuple[int, Rule]]
) -> NDArray[np.float32]:
    """Return (n_samples, n_parts, width), one (layer, rule) each."""
    out = np.empty((len(encoded), len(parts), trunk.width), dtype=np.float32)
    for batch in trunk.passes(encoded):
        out[batch.rows] = trunk.pool_batch(batch, parts).cpu().numpy()
    return out
