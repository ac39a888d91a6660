"""How evenly tokens are spread over experts.

With load_e the number of (token, choice) pairs sent to expert e and a uniform target:

    MaxVio = max_e load_e / mean load - 1        (Wang et al., arXiv 2408.15664)

0 is perfect balance, E/k - 1 is complete collapse on k experts. A batch of T tokens routed uniformly *at
random* does not reach 0 either: no method shows a batch MaxVio below its ``sampling_floor``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ExpertStats", "max_violation", "sampling_floor"]


@dataclass(frozen=True)
class ExpertStats:
    """Load of one layer over one optimizer step."""

    load: list[float]
    """Share of the routed choices per expert; sums to 1."""
    max_violation: float
    """MaxVio."""
    dead_experts: int
    """Experts that no token chose."""
    tokens: int
    """Tokens counted."""

    @classmethod
    def from_counts(cls, counts_e: Tensor, top_k: int) -> ExpertStats:
        """Build from integer counts of shape (experts,)."""
        counts_e = counts_e.cpu()
        total = int(counts_e.sum())
        return cls(
            load=(counts_e.double() / max(total, 1)).tolist(),
            max_violation=max_violation(counts_e),
            dead_experts=int((counts_e == 0).sum()),
            tokens=total // top_k,
        )


def max_violation(counts_e: Tensor) -> float:
    """MaxVio of counts of shape (experts,); 0 for an empty batch.

    Example:
        >>> max_violation(torch.tensor([4, 2, 2, 0]))
        1.0
    """
    total = int(counts_e.sum())
    return float(counts_e.max()) * counts_e.numel() / total - 1.0 if total else 0.0


def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """Expected MaxVio of a batch routed uniformly at random (normal approximation of the maximum).

    Args:
        tokens: Tokens in the batch.
        num_experts: E.
        top_k: k.

    Example:
        >>> abs(sampling_floor(4096, 64, 6) - 0.12) < 0.01  # 0.120 by simulation
        True
    """
    share = top_k / num_experts
    if tokens == 0 or share >= 1.0:
        return 0.0
    relative = math.sqrt((1.0 - share) / (share * tokens))
    # Blom's approximation of the expected maximum of E standard normals.
    quantile = (num_experts - 0.375) / (num_experts + 0.25)
    return relative * float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
