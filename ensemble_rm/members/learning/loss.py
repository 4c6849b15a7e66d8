"""The training loss of preference pairs, one value per pair; the caller reduces them.

References
----------
.. [1] Bradley & Terry 1952: P(first is preferred) = σ(r₁ − r₂).
.. [2] Touvron et al. 2023, arXiv 2307.09288: the margin.
.. [3] Eisenstein et al. 2023, arXiv 2312.09244: centring.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    targets: torch.Tensor,
    *,
    margins: torch.Tensor | float = 0.0,
    smoothing: float = 0.0,
    centring: float = 0.0,
) -> torch.Tensor:
    """Bradley–Terry loss [1]_ of each pair, in nats, unchanged when a pair's sides are exchanged.

    Parameters
    ----------
    chosen, rejected : torch.Tensor
        Scores of the two sides, any shape.
    targets : torch.Tensor
        P(chosen is preferred), broadcast to the scores: 1, ½ for a tie, the share of votes.
    margins : torch.Tensor or float
        Subtracted from the score difference [2]_.
    smoothing : float
        ε in [0, 1): targets become (1 − ε)·y + ε/2.
    centring : float
        Coefficient of (chosen + rejected)², which keeps scores about 0 [3]_.

    Returns
    -------
    torch.Tensor
        One loss per pair.
    """
    difference = chosen - rejected - margins
    y = (1 - smoothing) * targets + smoothing / 2
    loss = y * softplus(-difference) + (1 - y) * softplus(difference)
    return loss + centring * (chosen + rejected) ** 2 if centring else loss
