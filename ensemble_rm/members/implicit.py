"""DPO's implicit reward as a member: β·log[π(y|x)/π_ref(y|x)], from any policy and its reference.

The log-probabilities are summed over the completion's tokens, including the end of its turn, as in
DPO's loss.

References
----------
.. [1] Rafailov et al. 2023, arXiv 2305.18290: the reward that a policy is optimal for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.file_digests import FileCheck, FileDigest, digests_json
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.digest import member_digest
from ensemble_rm.members.encoding import TextEncoder, count_truncation
from ensemble_rm.members.forward.batching import Batch, batches, pick_token_budget
from ensemble_rm.members.model_scorer import ModelScorer, in_turn
from ensemble_rm.members.scorer import MemberScores
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import get

# Maximum bytes of a batch's float32 logits: with a large vocabulary, these are the largest tensor.
_LOGITS = 64 * 2**20


class ImplicitScorer(ModelScorer):
    """A policy and its reference as one member: β·log[π(y|x)/π_ref(y|x)] [1]_.

    Like a Bradley–Terry score, the reward is determined up to a function of the prompt. Both models
    read the same tokens, in the policy's template. A longer completion adds more terms to the sum:
    check the scores for a length bias.

    Parameters
    ----------
    backbone : Backbone
        The policy, a causal language model; see `from_names`.
    options : TrunkOptions, optional
        Template, truncation, dtype, device. Prompts are not shared, whatever `share_prefix` is.
    reference : Backbone
        The model that the policy was trained from, with the same vocabulary.
    beta : float
        The β of the policy's training, > 0. It scales all scores, which normalisation undoes.
    name : str, optional
        Name of the column (default: the policy's folder).
    """

    kind = "implicit"

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions | None = None,
        *,
        reference: bb.Backbone,
        beta: float = 0.1,
        name: str | None = None,
    ) -> None:
        if not (np.isfinite(beta) and beta > 0):
            raise OptionError(f"beta must be a finite number > 0, not {beta!r}")
        super().__init__(backbone, options or TrunkOptions(), [name or Path(backbone.name).name])
        self.reference, self.beta = reference, float(beta)
        self.device = bb.pick_device(self.options.device)
        self._encoder: TextEncoder | None = None
        self._models: tuple[Any, Any] | None = None
        self._budget = 0

    @classmethod
    def from_names(
        cls,
        policy: str | Path,
        reference: str | Path,
        options: TrunkOptions | None = None,
        *,
        beta: float = 0.1,
        name: str | None = None,
        cache_dir: Path | None = DEFAULT_CACHE,
        trust_remote_code: Sequence[str] = (),
    ) -> ImplicitScorer:
        """Open Hub ids or local folders; the weights are loaded immediately.

        Raises
        ------
        ModelError
            If there is no such model, or the two have different vocabularies.
        OptionError
            If a model is not a causal language model, or `beta` is not > 0.
        """
        backbone, other = (
            bb.locate(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
            for model in (policy, reference)
        )
        scorer = cls(backbone, options, reference=other, beta=beta, name=name)
        scorer._open()
        return scorer

    def _open(self) -> tuple[TextEncoder, tuple[Any, Any]]:
        with self._lock:
            if self._encoder is None:
                self._encoder = self._make_encoder()
            if self._models is None:
                for model in (self.backbone, self.reference):
                    bb.require_unchanged(model)
                policy, reference = (
                    bb.load_causal(model.folder, dtype=self.options.dtype, code=model.code).to(
                        self.device
                    )
                    for model in (self.backbone, self.reference)
                )
                self._models = policy, reference
                self._budget = self._pick_budget(policy)
            return self._encoder, self._models

    def _make_encoder(self) -> TextEncoder:
        tokenizer, other = (
            bb.load_tokenizer(model.folder, code=model.code)
            for model in (self.backbone, self.reference)
        )
        if tokenizer.get_vocab() != other.get_vocab():
            raise ModelError(
                f"{self.backbone.name} and {self.reference.name} have different vocabularies; "
                "name the model that the policy was trained from as its reference"
            )
        encoder = TextEncoder(
            tokenizer, template=self.options.template, max_length=self.options.max_length
        )
        if encoder.template == "pair":
            raise OptionError("template 'pair' is for encoders; use 'chat' or 'plain' for a policy")
        return encoder

    def _pick_budget(self, policy: Any) -> int:
        config = policy.config.get_text_config()
        budget = pick_token_budget(
            self.options.token_budget,
            policy,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            device=self.device,
        )
        if self.options.token_budget is not None:
            return budget
        return max(min(budget, _LOGITS // (4 * int(config.vocab_size))), 1)

    def _drop_model(self) -> None:
        self._models = None  # the tokenizer is small and is kept

    @in_turn
    @torch.inference_mode()
    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - this kind has no features
        progress: Progress = silent,
    ) -> MemberScores:
        """Return the scores and which samples were truncated."""
        encoder, models = self._open()
        encoded = encoder.encode(samples)
        # An empty completion has no tokens in a plain text: its probability is 1 under both models.
        # In a chat template it has the token that ends its turn.
        empty = [encoder.template == "plain" and not sample.completion for sample in samples]
        out, done = np.zeros((len(encoded), 1)), 0
        for batch in batches(encoded, token_budget=self._budget, device=self.device):
            policy, reference = (completion_log_probs(model, batch) for model in models)
            out[batch.rows, 0] = self.beta * (policy - reference).cpu().numpy()
            done += len(batch.rows)
            progress("scoring", done, len(encoded))
        out[np.array(empty, dtype=np.bool_)] = 0.0
        return MemberScores(out, count_truncation(encoded))

    def _parts(self) -> dict[str, Any]:
        return {"reference": self.reference, "beta": self.beta, "name": self.names[0]}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the scores depend on."""
        settings = {
            "beta": self.beta,
            "reference": self.reference.digest,
            "reference_reads": bb.reading_digest(self.reference.folder),
        }
        return member_digest(self.kind, self.backbone, self.options, settings, {})

    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.names[0],
            "beta": self.beta,
            "reference": self.reference.name,
            "reference_digest": self.reference.digest,
        }

    def _write(self, folder: Path) -> dict[str, Any]:  # noqa: ARG002 - no weights of its own
        return {
            "reference_files": digests_json(self.reference.files),
            "reference_revision": self.reference.revision,
        }

    @classmethod
    def _read(
        cls,
        folder: Path,  # noqa: ARG003 - no weights of its own
        saved: Mapping[str, Any],
        check: FileCheck,
        trust_remote_code: Sequence[str],
    ) -> dict[str, Any]:
        reference = bb.locate_same(
            get(saved, "reference", str),
            get(saved, "reference_digest", str),
            files=get(saved, "reference_files", Mapping[str, FileDigest] | None, None),
            revision=get(saved, "reference_revision", str | None, None),
            check=check,
            trust_remote_code=trust_remote_code,
        )
        return {
            "reference": reference,
            "beta": get(saved, "beta", float),
            "name": get(saved, "name", str),
        }

    @classmethod
    def _model_name(
        cls,
        folder: Path,  # noqa: ARG003 - no weights of its own
        saved: Mapping[str, Any],
        backbone: str | Path | None,  # noqa: ARG003 - names the backbone of other members
    ) -> str | Path:
        name: str = get(saved, "backbone", str)
        return name


def token_log_probs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of tokens, from where the batch's first completion begins.

    Parameters
    ----------
    model : transformers causal language model
    batch : Batch
        Padded on the right.

    Returns
    -------
    tuple of torch.Tensor
        (B, W) float64 log-probabilities in nats, and (B, W) bool, whether a token belongs to the
        completion. The first token of a sequence has no probability and is omitted.
    """
    width = batch.ids.shape[1]
    begin = int(batch.starts.min().clamp(min=1))  # tokens before it are not needed
    options: dict[str, Any] = {"use_cache": False}
    # Logits of the prompt would take most of the memory, so models that can leave them out do.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = width - begin + 1
    with _contiguous_input(model.get_output_embeddings()):
        logits = model(**batch.model_inputs(), **options).logits[:, -(width - begin + 1) : -1]
    log_probs = logits.float().log_softmax(dim=-1)
    chosen = log_probs.gather(-1, batch.ids[:, begin:, None])[..., 0].double()
    position = torch.arange(begin, width, device=batch.ids.device)
    inside = (position >= batch.starts[:, None]) & (position < batch.lengths[:, None])
    return chosen, inside


@contextmanager
def _contiguous_input(head: torch.nn.Module | None) -> Iterator[None]:
    """Make the input of a model's output layer contiguous.

    In bfloat16 on a CPU, the matrix product of a noncontiguous slice takes 100 times as long.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def completion_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Sum each completion's log-probabilities; (B,) float64, nats."""
    log_probs, inside = token_log_probs(model, batch)
    return torch.where(inside, log_probs, 0.0).sum(dim=1)
