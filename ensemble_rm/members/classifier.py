"""Members that exist already: a sequence-classification reward model of one output.

The model keeps its published pooling, which is transformers' own: of a decoder, the last token
whose id is not the pad token's. Padding stands on the right and is that token, so that the rule
reads the same place whatever the batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.errors import BackboneError, StorageError
from ensemble_rm.members import backbone as bb
from ensemble_rm.members.batching import batches
from ensemble_rm.members.text import TextEncoder, Truncation, count_truncation
from ensemble_rm.members.trunk import Progress, TrunkOptions, silent
from ensemble_rm.samples import Sample


class ClassifierScorer:
    """A published reward model as one member.

    Parameters
    ----------
    backbone : Backbone
        The model's folder; see `from_name`.
    options : TrunkOptions, optional
        Template, truncation, dtype, device.
    name : str, optional
        The column's; the folder's where not given.
    """

    kind = "classifier"

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.backbone = backbone
        self.options = options or TrunkOptions()
        self.names = (name or Path(backbone.name).name,)
        self.device = bb.pick_device(self.options.device)
        self._encoder: TextEncoder | None = None
        self._model: Any = None
        self._lock = Lock()

    @classmethod
    def from_name(
        cls,
        model: str | Path,
        options: TrunkOptions | None = None,
        *,
        name: str | None = None,
        cache_dir: Path | None = bb.DEFAULT_CACHE,
    ) -> ClassifierScorer:
        """Open a hub id or a local folder; its weights are read at once.

        Raises
        ------
        BackboneError
            If there is no such model, or it has not one output.
        MissingHeadError
            If the head's weights are absent.
        """
        scorer = cls(bb.locate(model, cache_dir=cache_dir), options, name=name)
        scorer._open()
        return scorer

    def _open(self) -> tuple[TextEncoder, Any]:
        with self._lock:
            if self._encoder is None:
                folder = self.backbone.folder
                model = bb.load_classifier(folder, dtype=self.options.dtype)
                tokenizer = bb.load_tokenizer(folder)
                if model.config.pad_token_id is None:
                    model.config.pad_token_id = tokenizer.pad_token_id
                if model.config.pad_token_id is None:
                    raise BackboneError(
                        f"{folder} names no pad token, by which its pooling finds the last token; "
                        "set pad_token in its tokenizer's config"
                    )
                self._model = model.eval().requires_grad_(requires_grad=False).to(self.device)
                self._encoder = TextEncoder(
                    tokenizer, template=self.options.template, max_length=self.options.max_length
                )
            return self._encoder, self._model

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) raw scores, in the order of the samples."""
        return self.score_counted(samples)[0]

    @torch.inference_mode()
    def score_counted(
        self, samples: Sequence[Sample], *, progress: Progress = silent
    ) -> tuple[NDArray[np.float64], Truncation]:
        """Return the scores, and how many samples were cut."""
        encoder, model = self._open()
        encoded = encoder.encode(samples)
        out = np.empty((len(encoded), 1))
        pad, done = model.config.pad_token_id, 0
        for batch in batches(encoded, token_budget=self.options.token_budget, device=self.device):
            inputs = batch.model_inputs()
            inputs["input_ids"] = torch.where(batch.mask.bool(), batch.ids, pad)
            out[batch.rows] = model(**inputs).logits.double().cpu().numpy()
            done += len(batch.rows)
            progress("scoring", done, len(encoded))
        return out, count_truncation(encoded)

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports say of it."""
        return {
            "kind": self.kind,
            "backbone": self.backbone.name,
            "digest": self.backbone.digest,
            "options": asdict(self.options),
            "name": self.names[0],
            "pooling": "published (transformers)",
        }

    def save(self, folder: Path) -> None:
        """Write ``member.json``; the model stays where it is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "member.json").write_text(json.dumps(self.describe(), indent=1) + "\n")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backbone: str | Path | None = None,  # noqa: ARG003 - heads have one, this is its own
        device: str | None = None,
        cache_dir: Path | None = bb.DEFAULT_CACHE,
    ) -> ClassifierScorer:
        """Read what `save` wrote; the model must lie where it lay.

        Raises
        ------
        BackboneError
            If the model's weights have changed.
        StorageError
            If the folder is incomplete.
        """
        try:
            said = json.loads((folder / "member.json").read_text())
            options = replace(TrunkOptions(**said["options"]), device=device)
            found = bb.locate(said["backbone"], cache_dir=cache_dir)
            digest, name = said["digest"], said["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{folder} is no saved classifier member: {error}") from error
        if found.digest != digest:
            raise BackboneError(
                f"the weights of {found.name} (SHA-256 {found.digest[:12]}…) have changed since "
                f"the ensemble was saved ({digest[:12]}…)"
            )
        return cls(found, options, name=name)
