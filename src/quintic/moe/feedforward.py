"""A dense feed-forward network, plain or gated: what one expert is, and what every token visits when shared.

gated:  W_down (act(W_gate x) * W_up x)          plain:  W_down act(W_up x)        (Shazeer, arXiv 2002.05202)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quintic.core.roles import Normal, Role, declare
from quintic.moe.activation import (
    ACTIVATIONS,
    activate_,
    activation_backward_,
    check_activation,
    halves,
)
from quintic.moe.fused import fits_fused_feedforward, fused_feedforward

__all__ = ["FeedForward", "SwiGLU"]


class FeedForward(nn.Module):
    """A dense feed-forward network without biases.

    Args:
        d_model: Width in and out.
        d_hidden: Hidden width.
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
        gated: Whether the activation of one projection multiplies another.
        out_scale: Factor of the initial standard deviation of the output projection.

    Raises:
        ConfigError: The activation is unknown.

    The input projection is ``gate_up`` (2 * hidden, width), gate rows first, or ``up`` (hidden, width).
    """

    def __init__(
        self, d_model: int, d_hidden: int, *, activation: str = "silu", gated: bool = True, out_scale: float = 1.0
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.gated = gated
        height = 2 * d_hidden if gated else d_hidden
        self.register_parameter(self.in_name, nn.Parameter(torch.empty(height, d_model)))
        self.down = nn.Parameter(torch.empty(d_model, d_hidden))
        declare(self, self.in_name, Role.MATRIX, Normal(1.0 / math.sqrt(d_model)), row_blocks=2 if gated else 1)
        declare(self, "down", Role.MATRIX, Normal(out_scale / math.sqrt(d_hidden)))

    @property
    def in_name(self) -> str:
        """Name of the input projection."""
        return "gate_up" if self.gated else "up"

    def extra_repr(self) -> str:
        """Sizes and activation."""
        width, hidden = self.down.shape
        return f"{width} -> {hidden} -> {width}, {'gated ' if self.gated else ''}{self.activation}"

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """(..., width) -> (..., width); ``plus``, of the same shape, is added."""
        w_in = getattr(self, self.in_name)
        training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if training and self.gated and fits_fused_feedforward(x, w_in, self.down, self.activation, plus):
            return fused_feedforward(x, w_in, self.down, self.activation, plus)
        y = self._forward(x, w_in, training)
        return y if plus is None else plus + y

    def _forward(self, x: Tensor, w_in: Tensor, training: bool) -> Tensor:
        h = F.linear(x, w_in)
        function = ACTIVATIONS[self.activation].function
        if not self.gated:
            return F.linear(function(h), self.down)
        # The compiler fuses these and decides itself what to keep; without gradients there is nothing to keep.
        if not training:
            gate, up = h.chunk(2, dim=-1)
            return F.linear(function(gate) * up, self.down)
        a: Tensor = _GatedActivation.apply(h, self.activation)  # type: ignore[assignment]
        return F.linear(a, self.down)


class SwiGLU(FeedForward):
    """The gated network with silu of DeepSeek-V3 and Moonlight.

    Args:
        d_model: Width in and out.
        d_hidden: Hidden width.
        out_scale: Factor of the initial standard deviation of the output projection.
    """

    def __init__(self, d_model: int, d_hidden: int, *, out_scale: float = 1.0) -> None:
        super().__init__(d_model, d_hidden, out_scale=out_scale)


class _GatedActivation(torch.autograd.Function):
    """act(g) * u of a projection h = [g u], keeping h only."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(h)
        ctx.activation = activation
        a = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        activate_(activation, halves(h, a.shape[-1]), a)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (h,) = ctx.saved_tensors
        dh, da = torch.empty_like(h), grad_outputs[0].clone()  # autograd's tensors are not ours to overwrite
        parts, act = halves(h, da.shape[-1]), torch.empty_like(da)
        ACTIVATIONS[ctx.activation].forward_(parts[0], act)
        activation_backward_(ctx.activation, da, parts, act, halves(dh, da.shape[-1]))
        return dh, None
