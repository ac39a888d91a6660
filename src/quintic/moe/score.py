"""Score functions: how logits x W become non-negative numbers that predict a norm.

Post: https://kexue.fm/archives/10699. A score predicts ||v_i||, so it need not sum to one; any h >= 0 is legal:

===========  =============================================  ==================================================
name         rho_i                                          remark
===========  =============================================  ==================================================
softmax      exp(x_i) / sum of exp(x_j)                     experts compete even for k > 1
sigmoid      1 / (1 + exp(-x_i))                            DeepSeek-V3, Moonlight; bounded, fits a bias step
relu         max(0, x_i)                                    a row may be all zero: such a token gets no expert
smooth_topk  sigmoid(x_i - c), c such that they sum to k    https://kexue.fm/archives/10373
one          1                                              gates that do not weigh, only with ``select``
===========  =============================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest

__all__ = ["SCORES", "Score", "smooth_topk"]

Score = str | Callable[[Tensor], Tensor]
"""A name of :data:`SCORES`, or a function from logits (tokens, experts) to non-negative scores of that shape."""

_BISECTIONS = 40
_WIDTH = 40.0  # sigmoid(40) = 1 and sigmoid(-40) = 0 within float32


def smooth_topk(logits_ne: Tensor, k: int) -> Tensor:
    """sigmoid(x_i - c) with c such that every row sums to k: a differentiable top-k.

    c is found by bisection; one Newton step, the only one that autograd sees, polishes it and carries its
    exact implicit gradient dc = sum w_i dx_i / sum w_i, w = sigmoid'.

    Args:
        logits_ne: (rows, n).
        k: Between 1 and n - 1.

    Example:
        >>> smooth_topk(torch.tensor([[30.0, 0.0, -30.0, 28.0]]), 2).round(decimals=4).tolist()
        [[1.0, 0.0, 0.0, 1.0]]
        >>> smooth_topk(torch.zeros(1, 4), 2).tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """
    with torch.no_grad():
        low = logits_ne.amin(-1, keepdim=True) - _WIDTH
        high = logits_ne.amax(-1, keepdim=True) + _WIDTH
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_many = torch.sigmoid(logits_ne - middle).sum(-1, keepdim=True) > k
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        cut = (low + high) / 2
    score = torch.sigmoid(logits_ne - cut)
    slope = (score * (1.0 - score)).sum(-1, keepdim=True).detach()
    # Where every sigmoid is flat the sum does not depend on c, and c needs no gradient.
    excess = score.sum(-1, keepdim=True) - k
    return torch.sigmoid(logits_ne - cut - torch.where(slope > 1e-6, excess / slope.clamp(min=1e-6), 0.0))


def _one(logits_ne: Tensor, k: int) -> Tensor:
    return torch.ones_like(logits_ne)


SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda logits_ne, k: torch.softmax(logits_ne, dim=-1),
    "sigmoid": lambda logits_ne, k: torch.sigmoid(logits_ne),
    "relu": lambda logits_ne, k: torch.relu(logits_ne),
    "smooth_topk": smooth_topk,
    "one": _one,
}


def check_score(name: str, score: Score) -> None:
    """Refuse what is neither a known name nor a function."""
    if not callable(score) and score not in SCORES:
        raise ConfigError(f"{name} = {score!r} is unknown{suggest(score, SCORES)}")


def apply_score(score: Score, logits_ne: Tensor, k: int) -> Tensor:
    """Scores of logits; those of a user's function are checked for shape, not for sign."""
    if not callable(score):
        return SCORES[score](logits_ne, k)
    scores_ne = score(logits_ne)
    if scores_ne.shape != logits_ne.shape:
        raise ConfigError(
            f"the score function returned shape {tuple(scores_ne.shape)} for logits of {tuple(logits_ne.shape)}; "
            "expected one score per token and expert"
        )
    return scores_ne
