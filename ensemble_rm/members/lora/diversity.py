"""A penalty on similar adapters, which training can add to its loss.

References
----------
.. [1] Zhai et al. 2024 (UP-RLHF), arXiv 2401.00243: maximise the nuclear norm of the members'
   concatenated LoRA matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Factors = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Each adapted layer's A, (rank, in), and B, (out, rank)."""

_TINY = 1e-12  # added to squared norms: B is zero at the start


def cosines(members: Sequence[Factors]) -> torch.Tensor:
    """Return the cosines between the members' updates of the weights, (k, k) float64.

    A member's update is B·A of all its layers, flattened to one vector. It is never formed:
    ⟨BᵢAᵢ, BⱼAⱼ⟩ is the sum of (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ).
    """
    total = torch.zeros(len(members), len(members), dtype=torch.float64)
    for layer in zip(*members, strict=True):
        a = torch.stack([a for a, _ in layer]).double()  # (k, rank, in)
        b = torch.stack([b for _, b in layer]).double()  # (k, out, rank)
        outer = torch.einsum("iop,joq->ijpq", b, b) * torch.einsum("ipn,jqn->ijpq", a, a)
        total = total.to(outer.device) + outer.sum((2, 3))
    norms = (total.diagonal() + _TINY).sqrt()
    cosine: torch.Tensor = total / norms / norms[:, None]
    return cosine


def alikeness(members: Sequence[Factors]) -> torch.Tensor:
    """Return k − ‖M‖⁎, where the rows of M are the members' updates at unit length.

    0 if all updates are orthogonal, k − √k if all are equal. Unlike in [1]_, the term depends on
    the product B·A and not on its factors, and a member cannot lower it by growing.
    """
    singular: torch.Tensor = (torch.linalg.eigvalsh(cosines(members)).clamp(min=0) + _TINY).sqrt()
    return len(members) - singular.sum()
