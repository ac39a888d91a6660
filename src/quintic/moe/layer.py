"""The mixture-of-experts layer: shared experts for every token, k routed experts for each.

    y = shared(x) + sum over i in argtop_k(rho + b) of rho_i expert_i(x)

Posts: https://kexue.fm/archives/10699 (why top-k by norm), /10757 (the bias b), /10945 (shared experts and
the routed scale). In a training loop of your own, call ``balance_step(model)`` after ``optimizer.step()``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quintic.core import ConfigError
from quintic.moe.balance import Balance, LossFree
from quintic.moe.experts import Experts, SwiGLU
from quintic.moe.router import Router, routed_scaling_factor
from quintic.moe.stats import ExpertStats

__all__ = ["MoE", "balance_step"]


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer in the manner of DeepSeek-V3 and Moonlight.

    Args:
        d_model: Width of a token.
        d_expert: Hidden width of one expert.
        num_experts: Routed experts.
        top_k: Routed experts per token.
        num_shared: Shared experts, fused in one feed-forward of width ``num_shared * d_expert``; 0 for none.
        route_scale: Factor of the routed branch; 0 computes the one that gives both branches equal RMS at
            initialisation (:func:`quintic.moe.router.routed_scaling_factor`).
        balance: How the load is balanced.
        out_scale: Factor of the initial standard deviation of the output projections.

    Raises:
        ConfigError: A size is not positive or ``top_k`` exceeds ``num_experts``.

    Parameters are uninitialised until :func:`quintic.core.initial.initialize_` fills them.

    Example:
        >>> from quintic.core.initial import initialize_
        >>> layer = MoE(16, 8, num_experts=4, top_k=2)
        >>> initialize_(layer, seed=0)
        >>> y = layer(torch.ones(3, 5, 16))
        >>> y.shape, layer.counts.sum().item()
        (torch.Size([3, 5, 16]), 30)
        >>> balance_step(layer)[0].tokens
        15
    """

    counts: Tensor

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared: int = 1,
        route_scale: float = 0.0,
        balance: Balance | None = None,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_expert", d_expert), ("num_experts", num_experts)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k must be between 1 and num_experts = {num_experts}, found {top_k}")
        if top_k == 1:
            raise ConfigError("top_k = 1 with normalised gates leaves the router without gradient; use top_k >= 2")
        if num_shared < 0:
            raise ConfigError(f"num_shared must be at least 0, found {num_shared}")
        self.balance = LossFree() if balance is None else balance
        scale = route_scale or routed_scaling_factor(num_experts, top_k)
        self.router = Router(d_model, num_experts, top_k, scale=scale)
        self.experts = Experts(d_model, d_expert, num_experts, out_scale=out_scale)
        self.shared = SwiGLU(d_model, num_shared * d_expert, out_scale=out_scale) if num_shared else None
        self.stats: ExpertStats | None = None
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., width).
            mask: (...) bool; False marks padding, which is computed but not counted as load.

        Returns:
            (..., width).
        """
        x_nd = x.reshape(-1, x.shape[-1])
        routing = self.router(x_nd, None if mask is None else mask.reshape(-1))
        # Not inside a backward pass: activation checkpointing runs forward again and must not count twice.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.counts += routing.counts_e
        y_nd = self.experts(x_nd, routing.ids_nk, routing.gates_nk)
        if self.shared is not None:
            y_nd = y_nd + self.shared(x_nd)
        return y_nd.view(x.shape)


@torch.no_grad()
def balance_step(model: nn.Module) -> list[ExpertStats]:
    """Update every balancer of a model from the load since the last call, and reset the counters.

    Call it once per optimizer step, after the batch that used the old bias.

    Returns:
        One :class:`ExpertStats` per MoE layer, in module order; also kept as ``layer.stats``.
    """
    stats = []
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.balance.step(layer.router.bias, layer.counts, layer.router.top_k)
            layer.stats = ExpertStats.from_counts(layer.counts, layer.router.top_k)
            layer.counts.zero_()
            stats.append(layer.stats)
    return stats
