"""A dense feed-forward network of one piece on a CPU: an expert that every row visits, by the kernels of ``experts.c``.

With h = W_in x, a = act(h) and g = dy, it keeps h only:

    a is made again,   da = W_out' g,   dW_out = g a',   dW_in = dh x',   dx = W_in' dh

Legend: n rows, d width, f hidden width, h = 2 f (gated) or f.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintic.core.operators import operator
from quintic.moe import expert_kernels

__all__ = ["fits_fused_feedforward", "fused_feedforward"]

_ROWS = 8  # for each column of x


def fits_fused_feedforward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, plus: Tensor | None = None) -> bool:
    """Whether :func:`fused_feedforward` is for this.

    That is float32 on a CPU with kernels, an activation that they have, and at least eight times as many rows as the
    width: they are computed in parts of that size, which are to be shared out among threads.
    """
    many = x.numel() >= _ROWS * x.shape[-1] ** 2 > 0
    return (
        many
        and not torch.is_autocast_enabled("cpu")
        and expert_kernels.kernels_for(activation, x, w_in, w_out, *([] if plus is None else [plus])) is not None
    )


def fused_feedforward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, plus: Tensor | None = None) -> Tensor:
    """plus + w_out act(w_in x), gated or plain; once differentiable.

    Args:
        x: (..., d).
        w_in: (2 f, d), gate rows first; or (f, d) without gate.
        w_out: (d, f).
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
        plus: As x; None is 0.
    """
    y: Tensor = _FusedFeedForward.apply(x, w_in, w_out, activation, plus)  # type: ignore[assignment]
    return y


class _FusedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, plus: Tensor | None) -> Tensor:
        y, h_nh = _dense(x, w_in, w_out, activation, plus)
        ctx.save_for_backward(x, w_in, w_out, h_nh)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = list(ctx.needs_input_grad[:3])
        found = _dense_backward(grad_outputs[0], *ctx.saved_tensors, ctx.activation, needed)
        return *found, None, grad_outputs[0] if ctx.needs_input_grad[4] else None


def _forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, plus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, h_nh = _fake_forward(x, w_in, w_out, activation, plus)
    expert_kernels.dense_forward(x, w_in, w_out, activation, plus, h_nh, y)
    return y, h_nh


def _backward(
    dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, h_nh: Tensor, activation: str, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_in and w_out, those that ``output_mask`` asks for."""
    made = _fake_backward(dy, x, w_in, w_out, h_nh, activation, output_mask)
    expert_kernels.dense_backward(dy, x, w_in, w_out, h_nh, activation, *made)
    return made


def _fake_forward(x, w_in, w_out, activation, plus=None):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], w_in.shape[0])


def _fake_backward(dy, x, w_in, w_out, h_nh, activation, output_mask):
    needed = zip((x, w_in, w_out), output_mask, strict=True)
    return tuple(t.new_empty(t.shape) if on else None for t, on in needed)


def _forward_flops(x, w_in, w_out, activation, plus=None) -> int:
    return 2 * math.prod(x[:-1]) * (w_in[0] * w_in[1] + w_out[0] * w_out[1])


def _backward_flops(dy, x, w_in, w_out, h_nh, activation, output_mask) -> int:
    needs_x, needs_in, needs_out = output_mask
    return 2 * math.prod(x[:-1]) * ((needs_x + needs_in) * w_in[0] * w_in[1] + (1 + needs_out) * w_out[0] * w_out[1])


_dense = operator(
    "dense_forward(Tensor x, Tensor w_in, Tensor w_out, str activation, Tensor? plus=None) -> (Tensor, Tensor)",
    _forward, _fake_forward, _forward_flops,
)  # fmt: skip
_dense_backward = operator(
    "dense_backward(Tensor dy, Tensor x, Tensor w_in, Tensor w_out, Tensor h, str activation, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    _backward, _fake_backward, _backward_flops,
)  # fmt: skip
