"""A member's identity: one digest of everything its raw scores depend on.

Weights, tokenizer, config, template, truncation, dtype and the kind of device are part of it. A
member's name and the size of its batches are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.options import TrunkOptions

FORMAT = 1  # increased when a change of this library changes scores


def member_digest(
    kind: str,
    backbone: bb.Backbone,
    options: TrunkOptions,
    details: Mapping[str, Any],
    weights: Mapping[str, Any],
) -> str:
    """Digest a member.

    Parameters
    ----------
    kind : str
        The scorer's.
    backbone : Backbone
    options : TrunkOptions
        How it reads text.
    details : mapping of str to JSON values
        What else the scores depend on, such as views.
    weights : mapping of str to ndarray or torch.Tensor
        Those that are not the backbone's.

    Returns
    -------
    str
        SHA-256 in hexadecimal.
    """
    read = {
        "format": FORMAT,
        "kind": kind,
        "backbone": backbone.digest,
        "reads": bb.reading_digest(backbone.folder),
        "template": options.template,
        "max_length": options.max_length,
        "dtype": options.dtype,
        "device": bb.pick_device(options.device).type,
        "said": dict(details),
    }
    digest = hashlib.sha256(json.dumps(read, sort_keys=True).encode())
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: Any) -> bytes:
    if isinstance(array, torch.Tensor):
        # numpy has no bfloat16.
        array = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()
