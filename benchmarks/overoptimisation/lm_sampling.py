"""Many completions of a prompt from a Llama-like policy, quickly on one core.

All prompts of a batch have one length, so that nothing is padded, and are read once for all their
completions. A token is drawn from the whole vocabulary at temperature 1, by one uniform number.
Knows nothing of rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ensemble_rm.members.forward.cpu.kernels import quicken

BLOCK, ROWS = 256, 16  # tokens summed at once, and rows: what fits a core's own memory


@dataclass(frozen=True)
class _Keys:
    """Keys and values of one layer: the prompts', which all their copies share, and the rows' own.

    (n_prompts, kv_heads, P, head_dim) and (B, kv_heads, T, head_dim), by keys and by values.
    """

    prompts: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]

    def attend(self, q: torch.Tensor, length: int, scale: float) -> torch.Tensor:
        """Attend to prompt and `length` own tokens: (B, kv_heads, group, head_dim), as q is.

        The query heads of one key head stand as its several queries, those of all copies of a
        prompt in one row; both results are put together by the log-sum-exp of their scores.
        """
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        keys, values = (kept[:, :, :length] for kept in self.own)
        own, own_lse = attention(q, keys, values, scale=scale)
        n, (_, heads, group, width) = len(self.prompts[0]), q.shape
        folded = q.view(n, -1, heads, group, width).transpose(1, 2).reshape(n, heads, -1, width)
        found, lse = attention(folded, *self.prompts, scale=scale)
        found = found.view(n, heads, -1, group, width).transpose(1, 2).reshape(q.shape)
        lse = lse.view(n, heads, -1, group).transpose(1, 2).reshape(own_lse.shape)
        return own.lerp(found, torch.sigmoid(lse - own_lse)[..., None].to(q.dtype))


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from softmax(logits) by inversion.

    Parameters
    ----------
    logits : torch.Tensor
        (B, V).
    uniform : torch.Tensor
        (B,) float64 in [0, 1).

    Returns
    -------
    torch.Tensor
        (B,) int64.
    """
    drawn = []
    for rows, u in zip(logits.split(ROWS), uniform.split(ROWS), strict=True):
        short = -rows.shape[1] % BLOCK
        x = torch.nn.functional.pad(rows.float(), (0, short), value=-torch.inf)
        weights = (x - x.amax(dim=1, keepdim=True)).exp_().view(len(x), -1, BLOCK)
        sums = weights.sum(dim=2).double().cumsum(dim=1)
        point = (u * sums[:, -1])[:, None]
        block = torch.searchsorted(sums, point, right=True).clamp(max=sums.shape[1] - 1)
        below = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = weights[torch.arange(len(x)), block[:, 0]].double().cumsum(dim=1)
        # The last token of any weight is the bound: rounding must not choose an impossible one.
        last = (inside < inside[:, -1:]).sum(dim=1, keepdim=True)
        place = torch.searchsorted(inside, point - below, right=True).minimum(last)
        drawn.append(block * BLOCK + place)
    return torch.cat(drawn)[:, 0]


class Sampler:
    """A policy that continues prompts.

    Parameters
    ----------
    model : LlamaForCausalLM
        In evaluation mode.
    eos : int
        The token that ends a completion.
    """

    def __init__(self, model: LlamaForCausalLM, *, eos: int) -> None:
        self.model, self.eos = model, eos
        self.inner: Any = model.model
        quicken((model,), torch.device("cpu"))

    @torch.inference_mode()
    def sample(
        self, prompts: torch.Tensor, *, copies: int, tokens: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Return completions, -1 after their ends: (n_prompts·copies, tokens), a prompt's together.

        Parameters
        ----------
        prompts : torch.Tensor
            (n_prompts, P) token ids.
        copies : int
            Completions of each prompt.
        tokens : int
            Most new tokens of a completion; one that is longer is cut.
        generator : torch.Generator
        """
        logits, cache = self.read(prompts, copies, tokens)
        out = torch.empty((len(logits), tokens), dtype=torch.int64)
        for step in range(tokens):
            out[:, step] = draw(
                logits, torch.rand(len(out), generator=generator, dtype=torch.float64)
            )
            if step + 1 < tokens:
                logits = self.step(out[:, step], step, cache)
        ends = out == self.eos
        return out.masked_fill(ends.cumsum(dim=1) - ends.long() > 0, -1)

    @torch.inference_mode()
    def read(
        self, prompts: torch.Tensor, copies: int, tokens: int
    ) -> tuple[torch.Tensor, list[_Keys]]:
        """Read the prompts once: the next token's logits, and room for all completions."""
        found: Any = self.model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        cache = []
        for layer in found.past_key_values.layers:
            _, heads, _, width = layer.keys.shape
            shape = (len(prompts) * copies, heads, tokens, width)
            own = (layer.keys.new_empty(shape), layer.values.new_empty(shape))
            cache.append(_Keys((layer.keys, layer.values), own))
        return found.logits[:, -1].repeat_interleave(copies, dim=0), cache

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, place: int, cache: list[_Keys]) -> torch.Tensor:
        """Return the logits after one more token of each row, its `place`-th from 0."""
        x = self.inner.embed_tokens(ids)
        position = cache[0].prompts[0].shape[2] + place
        turns = self.inner.rotary_emb(x, torch.tensor([[position]]))
        for block, layer in zip(self.inner.layers, cache, strict=True):
            attention = block.self_attn
            normed, n, width = block.input_layernorm(x), len(x), attention.head_dim
            q, k, v = (
                project(normed).view(n, -1, 1, width)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *turns)
            for kept, new in zip(layer.own, (k, v), strict=True):
                kept[:, :, place] = new[:, :, 0]
            grouped = q.view(n, k.shape[1], -1, width)
            mixed = layer.attend(grouped, place + 1, attention.scaling)
            x = x + attention.o_proj(mixed.reshape(n, -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.model.lm_head(self.inner.norm(x))
