"""A member's identity: a digest of everything that its raw scores depend on.

It covers weights, tokenizer, config, template, truncation, dtype and the type of the device, but
not the member's name or the batch size.
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

FORMAT = 1  # increase it when a change to this library changes scores


def member_digest(
    kind: str,
    backbone: bb.Backbone,
    options: TrunkOptions,
    details: Mapping[str, Any],
    weights: Mapping[str, Any],
) -> str:
    """Return the digest of a member.

    Parameters
    ----------
    kind : str
        Kind of the scorer.
    backbone : Backbone
    options : TrunkOptions
        How the backbone reads text.
    details : mapping of str to JSON values
        Everything else that the scores depend on, such as views.
    weights : mapping of str to ndarray or torch.Tensor
        Weights in addition to the backbone's.

    Returns
    -------
    str
        SHA-256 in hexadecimal.
    """
    # Renaming a key would invalidate every cached score.
    identity = {
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
    if backbone.code is not None:  # only then, so that the digests of all other members stay
        identity["code"] = backbone.code
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: Any) -> bytes:
    if isinstance(array, torch.Tensor):
        # As bytes, since numpy has no bfloat16.
        array = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()
