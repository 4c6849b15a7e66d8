"""Checkpoints that a killed run resumes from: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ensemble_rm.errors import SchemaError, TrainingError
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.saved_json import as_object, parse_json

FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a state of JSON values to one file, so that both are of one step."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / (FILE + ".new")
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(flat, scratch, metadata={"state": json.dumps(state)})
    follow_umask(scratch)
    scratch.replace(folder / FILE)


def load_checkpoint(
    folder: Path, *, recipe: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the tensors and state in `folder`; None if there is no checkpoint.

    Parameters
    ----------
    folder : Path
    recipe : str
        Digest of all that the run depends on; a checkpoint's state names it as ``"recipe"``.

    Raises
    ------
    TrainingError
        If the checkpoint belongs to another recipe or data set, or cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            state = as_object(parse_json(stored.metadata()["state"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, SchemaError) as error:
        raise TrainingError(f"the checkpoint {path} cannot be read ({error}); delete it") from error
    if state.get("recipe") != recipe:
        raise TrainingError(
            f"the checkpoint {path} belongs to another recipe, data set or backbone; name another "
            "output folder, or delete it"
        )
    return tensors, state


def remove_checkpoint(folder: Path) -> None:
    """Delete a finished run's checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
