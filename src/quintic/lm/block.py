"""One block: x + attention(norm(x)), then x + feed-forward(norm(x)); dense at first, experts after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quintic.core.hooks import added, hooked
from quintic.lm.cache import LatentCache
from quintic.lm.compiling import compiled
from quintic.lm.config import LMConfig
from quintic.lm.mla import LatentAttention
from quintic.lm.norm import RMSNorm
from quintic.moe.feedforward import SwiGLU
from quintic.moe.layer import MoE

__all__ = ["Block"]


class Block(nn.Module):
    """A transformer block.

    Args:
        config: Sizes.
        index: Position in the stack; the first ``num_dense_layers`` have a dense feed-forward.
    """

    def __init__(self, config: LMConfig, index: int) -> None:
        super().__init__()
        c = config
        self.compiled = c.compile
        # Each of the 2 L branches adds to the residual stream; this keeps its variance of order one.
        out_scale = (2 * c.num_layers) ** -0.5
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = LatentAttention(c, out_scale=out_scale)
        self.ffn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.ffn: SwiGLU | MoE
        if index < c.num_dense_layers:
            self.ffn = SwiGLU(c.d_model, c.d_ff, out_scale=out_scale)
        elif c.dense:
            self.ffn = SwiGLU(c.d_model, (c.top_k + c.num_shared) * c.d_expert, out_scale=out_scale)
        else:
            self.ffn = MoE(
                c.d_model, c.d_expert, c.num_experts, c.top_k, num_shared=c.num_shared, route_scale=c.route_scale,
                normalize_experts=c.normalize_experts or None, **c.routing, balance=c.make_balance(),
                out_scale=out_scale, initialize=False,
            )  # fmt: skip

    def forward(
        self,
        x_btd: Tensor,
        rotation: Tensor,
        allowed: Tensor | None = None,
        counted: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """(batch, time, width) -> the same; see :class:`LatentAttention` and :class:`quintic.moe.MoE`."""
        if self.compiled and self.training and torch.is_grad_enabled():
            run = compiled(Block._forward, x_btd.device)
            return run(self, x_btd, torch.view_as_real(rotation), allowed, counted, cache)
        return self._forward(x_btd, rotation, allowed, counted, cache)

    def _forward(
        self,
        x_btd: Tensor,
        rotation: Tensor,
        allowed: Tensor | None,
        counted: Tensor | None,
        cache: LatentCache | None,
    ) -> Tensor:
        attended = None
        if allowed is None and cache is None:
            attended = self.attention.add_to_stream(x_btd, self.attention_norm, rotation)
        if attended is None:
            attended = x_btd + self.attention(self.attention_norm(x_btd), rotation, allowed, cache)
        counting = (counted,) if isinstance(self.ffn, MoE) else ()
        if hooked(self.ffn_norm):
            return added(attended, self.ffn, self.ffn_norm(attended), *counting)
        x_btd, h_btd = self.ffn_norm.stream(attended)
        return added(x_btd, self.ffn, h_btd, *counting)
