"""The router: one score per token and expert, k of them chosen.

Post: https://kexue.fm/archives/10699. The score rho_i = h(x W)_i >= 0 predicts the norm of what expert i
would contribute; keeping the k largest is the best k-term approximation of the dense layer if the experts'
outputs are orthogonal. Scores, selection and gates follow DeepSeek-V3 (arXiv 2412.19437):

    s = sigmoid(x W'),  chosen = argtop_k(s + b),  gate_i = scale * s_i / sum of the chosen s

Legend: n tokens, d width, e experts, k choices.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quintic.core.counter_rng import Stream
from quintic.core.roles import Normal, Role, declare

__all__ = ["Router", "Routing", "routed_scaling_factor"]

_NORM_EPS = 1e-20  # as in DeepSeek-V3; only there for a row of exact zeros


class Routing(NamedTuple):
    """Where each token goes."""

    ids_nk: Tensor
    """(tokens, k) int64, best first; equal scores go to the lower index."""
    gates_nk: Tensor
    """(tokens, k) float32 weights of the chosen experts."""
    counts_e: Tensor
    """(experts,) int64: choices per expert, unmasked tokens only."""


class Router(nn.Module):
    """Sigmoid scores in float32, biased selection, normalised gates.

    Args:
        d_model: Width of a token.
        num_experts: E.
        top_k: k, at most E.
        scale: Factor of the gates (``routed_scaling_factor``).

    The bias is a float32 buffer whatever the dtype of the model: in bfloat16 a step of 0.001 on a bias of
    5 would vanish. It gets no gradient and no weight decay. The weight starts random, not zero: with equal
    scores every token would go to the same k experts.
    """

    bias: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, scale: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        declare(self, "weight", Role.ROUTER, Normal(1.0 / math.sqrt(d_model)))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            # A cast may have rounded it: move the original values instead.
            self.bias = bias.to(self.bias.device)
        return self

    def forward(self, x_nd: Tensor, mask_n: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x_nd: (tokens, width).
            mask_n: (tokens,) bool; False tokens are routed but not counted.
        """
        with torch.autocast(x_nd.device.type, enabled=False):
            scores_ne = torch.sigmoid(x_nd.float() @ self.weight.float().t())
        # A stable sort, not topk: ties must go to the lower index on every device.
        ids_nk = torch.sort(scores_ne.detach() + self.bias, dim=-1, descending=True, stable=True)[1][:, : self.top_k]
        gates_nk = scores_ne.gather(1, ids_nk)
        gates_nk = gates_nk * (self.scale / (gates_nk.sum(-1, keepdim=True) + _NORM_EPS))
        counted = ids_nk if mask_n is None else ids_nk[mask_n]
        counts_e = torch.bincount(counted.flatten(), minlength=self.weight.shape[0])
        return Routing(ids_nk, gates_nk, counts_e)


@functools.lru_cache
def routed_scaling_factor(num_experts: int, top_k: int, num_shared: int = 1, samples: int = 8192) -> float:
    """The factor that gives routed and shared experts equal RMS at initialisation.

    lambda = sqrt(s) / E[sqrt(sum of the chosen gates squared)] for unit-norm orthogonal experts and N(0, 1)
    logits, sigmoid scores, normalised top-k (https://kexue.fm/archives/10945), by a fixed simulation.

    Args:
        num_experts: Routed experts E.
        top_k: Routed choices k.
        num_shared: Shared experts s; those fused in one feed-forward count once.
        samples: Simulated tokens; 8192 gives about three digits.

    Example:
        >>> abs(routed_scaling_factor(64, 6) - 2.446) < 0.002  # Moonlight's configuration
        True
    """
    logits = Stream(0, "routed scaling factor").normal(0, samples * num_experts).reshape(samples, num_experts)
    chosen = np.sort(1.0 / (1.0 + np.exp(-logits)), axis=1)[:, num_experts - top_k :]
    gates = chosen / chosen.sum(axis=1, keepdims=True)
    return float(math.sqrt(num_shared) / np.sqrt((gates**2).sum(axis=1)).mean())
