"""KL of a policy from the one that its run started with, measured on its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ensemble_rm.data.samples import Prompt, Sample
from ensemble_rm.members.encoding import Encoded, TextEncoder
from ensemble_rm.members.forward.batching import batches
from ensemble_rm.members.implicit import token_log_probs
from ensemble_rm.rl.kl import sequence_kl

_MAX_LENGTH = 4096
_KL_TOKENS = 2048


def encode_sampled(
    tokenizer: Any, samples: Sequence[Sample], tokens: Sequence[list[int] | None]
) -> list[Encoded]:
    """Encode prompts as TRL does, each followed by the sampled completion.

    A sample without tokens is encoded from its text, with the template's end of turn; a completion
    that was truncated has no such end.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The policy's tokenizer.
    samples : sequence of Sample
    tokens : sequence of (list of int or None)
        Token ids of each completion.
    """
    unknown = [sample for sample, ids in zip(samples, tokens, strict=True) if ids is None]
    rendered = iter(_encode_texts(tokenizer, unknown))
    prefixes: dict[Prompt, list[int]] = {}
    encoded = []
    for sample, ids in zip(samples, tokens, strict=True):
        if ids is None:
            encoded.append(next(rendered))
            continue
        if sample.prompt not in prefixes:
            prefixes[sample.prompt] = _prompt_ids(tokenizer, sample.prompt)
        before = prefixes[sample.prompt]
        encoded.append(Encoded([*before, *ids], len(before)))
    return encoded


def _prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    prompt_tokens = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True
    )
    return list(prompt_tokens["input_ids"])


def _encode_texts(tokenizer: Any, samples: Sequence[Sample]) -> list[Encoded]:
    if not samples:
        return []
    encoder = TextEncoder(tokenizer, max_length=_MAX_LENGTH)
    if encoder.template == "pair":
        encoder = TextEncoder(tokenizer, template="plain", max_length=_MAX_LENGTH)
    return encoder.encode(samples)


def mean_kl(model: Any, reference: Any | None, encoded: Sequence[Encoded]) -> float:
    """Estimate KL(policy ‖ reference) by k3, nats per completion, as a mean over samples.

    Dropout is off, no random number is drawn, and accumulated gradients are kept.

    Parameters
    ----------
    model : transformers or peft model
        The policy.
    reference : torch.nn.Module, optional
        None for the base model of an adapter.
    encoded : sequence of Encoded
        Samples of the policy.
    """
    adapted, training, estimates = model, model.training, []
    model.eval()
    if reference is None and not adapted.active_peft_config.is_prompt_learning:
        model = adapted.get_base_model()  # has the adapter, and can skip the logits of the prompt
    other = model if reference is None else reference
    # Use the class's forward, as the reference does: accelerate's autocast would make them differ.
    patched = vars(model).pop("forward", None)
    try:
        for batch in batches(encoded, token_budget=_KL_TOKENS, device=model.device):
            with torch.no_grad():
                ours, inside = token_log_probs(model, batch)
                with adapted.disable_adapter() if reference is None else nullcontext():
                    theirs, _ = token_log_probs(other, batch)
            kl = sequence_kl(
                ours.cpu().numpy(), theirs.cpu().numpy(), inside.cpu().numpy(), estimator="k3"
            )
            estimates.append(kl)
    finally:
        adapted.train(training)
        if patched is not None:
            vars(model)["forward"] = patched
    return float(np.concatenate(estimates).mean())
