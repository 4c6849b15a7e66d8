"""Sequence-classification models of one output as members: published ones, and `full` members.

A published model keeps its pooling, which is transformers' own: of a decoder, the last token whose
id is not the pad token's. Padding stands on the right and is that token, so that the rule reads the
same place whatever the batch. A decoder that was trained here is read at its last attended token,
whatever that token is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import torch

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.file_digests import FileCheck
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.backbone.trunk import keeps_a_cache, pool
from ensemble_rm.members.digest import member_digest
from ensemble_rm.members.encoding import Encoded, TextEncoder, count_truncation
from ensemble_rm.members.forward.batching import Batch, passes, pick_token_budget
from ensemble_rm.members.forward.prefix_cache import read_prefix, splits_attention
from ensemble_rm.members.learning.averaging import (
    NAME,
    average_files,
    require_same,
    require_two,
)
from ensemble_rm.members.model_scorer import ModelScorer, in_turn
from ensemble_rm.members.scorer import MemberScores
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import get

ClassifierPooling: TypeAlias = Literal["published", "attended"]
"""Transformers' own rule, or the last attended token."""


def trained_pooling(model: torch.nn.Module) -> ClassifierPooling:
    """Return the rule by which a model is trained here: by the mask, where the rule is free.

    Decoders share one head over token states in transformers. Encoders read a fixed place.
    """
    from transformers.modeling_layers import GenericForSequenceClassification

    return "attended" if isinstance(model, GenericForSequenceClassification) else "published"


def classifier_scores(
    model: Any,
    batch: Batch,
    pooling: ClassifierPooling,
    *,
    forward: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Score one batch; training and scoring both call this.

    Parameters
    ----------
    model : transformers sequence-classification model
    batch : Batch
    pooling : {"published", "attended"}
    forward : callable, optional
        The model's own forward pass, where a trainer has put another in its place.

    Returns
    -------
    torch.Tensor
        (B,) float32.
    """
    inputs = batch.model_inputs()
    pad = model.config.get_text_config().pad_token_id
    # Padding must be the pad token, by which the published rule finds the last real token.
    inputs["input_ids"] = torch.where(batch.mask.bool(), batch.ids, pad)
    if pooling == "published":
        logits: torch.Tensor = (forward or model)(**inputs).logits
        return logits[:, 0].float()
    states = model.base_model(**({"use_cache": False} | inputs)).last_hidden_state
    last = pool(states, batch.starts, batch.lengths, "last")
    # Outside autocast: a head in bfloat16 would tie close completions.
    with torch.autocast(last.device.type, enabled=False):
        scores: torch.Tensor = last @ model.score.weight[0].float()
        return scores


def set_pad_token(model: Any, tokenizer: Any) -> None:
    """Give a model its tokenizer's pad token, where it has none.

    Raises
    ------
    ModelError
        If neither names one.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path} names no pad token, by which a batch is filled up; "
            "set pad_token in its tokenizer's config"
        )


def _lift_head(model: Any) -> None:
    """Run all that follows the trunk in float32: scores of bfloat16 would tie."""

    def cast(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )

    for name, child in model.named_children():
        if name != model.base_model_prefix:
            child.float().register_forward_pre_hook(cast)


class FullScorer(ModelScorer):
    """A sequence-classification reward model as one member.

    Parameters
    ----------
    backbone : Backbone
        The model's folder; see `from_name`.
    options : TrunkOptions, optional
        Template, truncation, dtype, device.
    name : str, optional
        The column's; the folder's where not given.
    pooling : {"published", "attended"}
        Transformers' own rule, or the last attended token.
    own : bool
        The weights were trained here, and are saved with the ensemble.
    start : str, optional
        Digest of the weights that their training started from.
    """

    kind = "full"

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions | None = None,
        *,
        name: str | None = None,
        pooling: ClassifierPooling = "published",
        own: bool = False,
        start: str | None = None,
    ) -> None:
        if pooling not in get_args(ClassifierPooling):
            raise OptionError(
                f"pooling must be one of {get_args(ClassifierPooling)}, not {pooling!r}"
            )
        super().__init__(backbone, options or TrunkOptions(), [name or Path(backbone.name).name])
        self.pooling: ClassifierPooling = pooling
        self.own, self.start = own, start
        self.device = bb.pick_device(self.options.device)
        self._encoder: TextEncoder | None = None
        self._model: Any = None
        self._causal, self._shares, self._splits, self._budget = False, False, False, 0

    @classmethod
    def from_name(
        cls,
        model: str | Path,
        options: TrunkOptions | None = None,
        *,
        name: str | None = None,
        cache_dir: Path | None = DEFAULT_CACHE,
        trust_remote_code: Sequence[str] = (),
    ) -> FullScorer:
        """Open a hub id or a local folder; its weights are read at once.

        Raises
        ------
        ModelError
            If there is no such model, or it has not one output.
            If the head's weights are absent.
        """
        backbone = bb.locate(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        scorer = cls(backbone, options, name=name)
        scorer._open()
        return scorer

    def _open(self) -> tuple[TextEncoder, Any]:
        # One load, also when several threads score at first.
        with self._lock:
            if self._encoder is None:
                self._encoder = TextEncoder(
                    bb.load_tokenizer(self.backbone.folder, code=self.backbone.code),
                    template=self.options.template,
                    max_length=self.options.max_length,
                )
            if self._model is None:
                bb.require_unchanged(self.backbone)
                model = bb.load_classifier(
                    self.backbone.folder, dtype=self.options.dtype, code=self.backbone.code
                )
                set_pad_token(model, self._encoder.tokenizer)
                if self.device.type == "cpu":
                    from ensemble_rm.members.forward.cpu.kernels import use_cpu_kernels

                    use_cpu_kernels(model)
                config = model.config.get_text_config()
                self._budget = pick_token_budget(
                    self.options.token_budget,
                    model.base_model,
                    # The budget follows the model's size.
                    width=config.hidden_size,
                    depth=config.num_hidden_layers,
                    device=self.device,
                )
                if self.options.dtype != "float32":
                    _lift_head(model)
                # Sharing needs our own pooling: the published rule looks for padding in the whole
                # text.
                self._causal = trained_pooling(model) == "attended" and keeps_a_cache(
                    model.base_model.to(self.device), self.device
                )
                self._shares = self.options.share_prefix and self._causal
                self._splits = self._shares and splits_attention(model.base_model, self.device)
                self._model = model.eval().requires_grad_(requires_grad=False).to(self.device)
            return self._encoder, self._model

    def _drop_model(self) -> None:
        self._model = None  # the tokenizer is small, and stays

    @in_turn
    @torch.inference_mode()
    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - these members have none
        progress: Progress = silent,
    ) -> MemberScores:
        """Return the scores and which samples were cut."""
        encoder, model = self._open()
        encoded = encoder.encode(samples)
        out = np.empty((len(encoded), 1))
        done = 0
        for batch in self._passes(encoded, model):
            scores = classifier_scores(model, batch, self.pooling)
            out[batch.rows, 0] = scores.double().cpu().numpy()
            done += len(batch.rows)
            progress("scoring", done, len(encoded))
        return MemberScores(out, count_truncation(encoded))

    def _passes(self, encoded: Sequence[Encoded], model: Any) -> Iterator[Batch]:
        """Yield batches that share their prompts, where the model can."""
        if self.pooling == "published":
            # A completion of pad tokens alone is read, by that rule, in its prompt: it shares none.
            pad = model.config.get_text_config().pad_token_id
            encoded = [e if set(e.ids[e.start :]) - {pad} else replace(e, start=0) for e in encoded]
        return passes(
            encoded,
            token_budget=self._budget,
            device=self.device,
            read=partial(read_prefix, model.base_model, device=self.device, splits=self._splits)
            if self._shares
            else None,
            splits=self._splits,
            causal=self._causal,
        )

    def _parts(self) -> dict[str, Any]:
        return {
            "name": self.names[0],
            "pooling": self.pooling,
            "own": self.own,
            "start": self.start,
        }

    @cached_property
    def digest(self) -> str:
        """Equal where the scores of equal samples are."""
        # The kind's former name: scores that were stored under it stay valid.
        read = {"pooling": self.pooling}
        return member_digest("classifier", self.backbone, self.options, read, {})

    @property
    def trained_from(self) -> str | None:
        """Digest of the weights that training started from; None of a model not trained here."""
        return self.start

    def _settings(self) -> dict[str, Any]:
        return self._parts()

    def _write(self, folder: Path) -> dict[str, Any]:
        if not self.own:
            return {}
        # Else a file that was changed after loading would be saved with a digest of its own.
        bb.require_unchanged(self.backbone)
        shutil.copytree(self.backbone.folder, folder / "model")
        return {"backbone": "model"}

    @classmethod
    def _read(
        cls,
        folder: Path,  # noqa: ARG003 - the weights are the model's
        saved: Mapping[str, Any],
        check: FileCheck,  # noqa: ARG003
        trust_remote_code: Sequence[str],  # noqa: ARG003 - no second model
    ) -> dict[str, Any]:
        return {
            "name": get(saved, "name", str),
            "pooling": get(saved, "pooling", ClassifierPooling),
            "own": get(saved, "own", bool),
            # Not in ensembles that were saved before it was kept.
            "start": get(saved, "start", str | None, None),
        }

    @classmethod
    def _model_name(
        cls,
        folder: Path,
        saved: Mapping[str, Any],
        backbone: str | Path | None,  # noqa: ARG003 - others have one, this is its own
    ) -> str | Path:
        return folder / "model" if get(saved, "own", bool) else get(saved, "backbone", str)

    @classmethod
    def average(cls, scorers: Sequence[Self], folder: Path | None) -> Self:
        """Write a model whose weights are the mean of these members', and open it.

        Raises
        ------
        OptionError
            If no folder is given.
        ModelError
            If there is only one member, one was not trained here, or they started from other
            weights, are read in other ways, or hold other weights.
        """
        first = scorers[0]
        require_two(len(scorers))
        for scorer in scorers:
            if not scorer.own or scorer.start is None:
                raise ModelError(
                    f"member {scorer.names[0]!r} does not say which weights its training started "
                    "from; the mean of unrelated models is no model: merge members of one run of "
                    "kind 'full'"
                    # Averages make sense between models of one start, which stayed in one basin.
                )
        require_same("starting checkpoint", [scorer.start for scorer in scorers])
        require_same("pooling", [scorer.pooling for scorer in scorers])
        require_same("way to read text", [replace(s.options, device=None) for s in scorers])
        if folder is None:
            raise OptionError("the mean of full members is kept on disk: give out=…")
        sources = [scorer.backbone.folder for scorer in scorers]
        files = [sorted(file.name for file in source.glob("*.safetensors")) for source in sources]
        require_same("weight files", files)
        shutil.copytree(sources[0], folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in files[0]:
            # File by file: two whole models in memory are not needed.
            average_files([source / file for source in sources], folder / file)
        return cls(
            bb.open_folder(folder),
            first.options,
            name=NAME,
            pooling=first.pooling,
            own=True,
            start=first.start,
        )
