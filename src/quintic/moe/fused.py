"""A dense feed-forward network of one piece on a CPU: an expert that every row visits, by the kernels of ``experts.c``.

With h = W_in x, a = act(h) and g = dy, it keeps h only:

    a is made again,   da = W_out' g,   dW_out = g a',   dW_in = dh x',   dx = W_in' dh

Legend: n rows, d width, f hidden width, h = 2 f (gated) or f.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from quintic.moe import expert_kernels

__all__ = ["fits_fused_feedforward", "fused_feedforward"]

_ROWS = 8  # for each column of x


def fits_fused_feedforward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> bool:
    """Whether :func:`fused_feedforward` is for this.

    That is float32 on a CPU with kernels, an activation that they have, and at least eight times as many rows as the
    width: they are computed in parts of that size, which are to be shared out among threads.
    """
    many = x.numel() >= _ROWS * x.shape[-1] ** 2 > 0
    return (
        many
        and not torch.is_autocast_enabled("cpu")
        and expert_kernels.kernels_for(activation, x, w_in, w_out) is not None
    )


def fused_feedforward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """w_out act(w_in x), gated or plain; once differentiable.

    Args:
        x: (..., d).
        w_in: (2 f, d), gate rows first; or (f, d) without gate.
        w_out: (d, f).
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
    """
    y_nd: Tensor = _FusedFeedForward.apply(x.reshape(-1, x.shape[-1]), w_in, w_out, activation)  # type: ignore[assignment]
    return y_nd.view(x.shape)


class _FusedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
        y_nd, h_nh = torch.ops.quintic.dense_forward(x_nd, w_in, w_out, activation)
        ctx.save_for_backward(x_nd, w_in, w_out, h_nh)
        ctx.activation = activation
        return y_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = list(ctx.needs_input_grad[:3])
        found = torch.ops.quintic.dense_backward(grad_outputs[0], *ctx.saved_tensors, ctx.activation, needed)
        return *found, None


def _forward(x_nd: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    y_nd, h_nh = _fake_forward(x_nd, w_in, w_out, activation)
    expert_kernels.dense_forward(x_nd, w_in, w_out, activation, h_nh, y_nd)
    return y_nd, h_nh


def _backward(
    dy_nd: Tensor, x_nd: Tensor, w_in: Tensor, w_out: Tensor, h_nh: Tensor, activation: str, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_in and w_out, those that ``output_mask`` asks for."""
    made = _fake_backward(dy_nd, x_nd, w_in, w_out, h_nh, activation, output_mask)
    expert_kernels.dense_backward(dy_nd, x_nd, w_in, w_out, h_nh, activation, *made)
    return made


def _fake_forward(x_nd, w_in, w_out, activation):
    return x_nd.new_empty(x_nd.shape), x_nd.new_empty(x_nd.shape[0], w_in.shape[0])


def _fake_backward(dy_nd, x_nd, w_in, w_out, h_nh, activation, output_mask):
    needed = zip((x_nd, w_in, w_out), output_mask, strict=True)
    return tuple(t.new_empty(t.shape) if on else None for t, on in needed)


torch.library.define(
    "quintic::dense_forward", "(Tensor x, Tensor w_in, Tensor w_out, str activation) -> (Tensor, Tensor)"
)
torch.library.define(
    "quintic::dense_backward",
    "(Tensor dy, Tensor x, Tensor w_in, Tensor w_out, Tensor h, str activation, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("quintic::dense_forward", "default", _forward)
torch.library.impl("quintic::dense_backward", "default", _backward)
torch.library.register_fake("quintic::dense_forward", _fake_forward)
torch.library.register_fake("quintic::dense_backward", _fake_backward)


@register_flop_formula(torch.ops.quintic.dense_forward)
def _forward_flops(x_nd, w_in, w_out, activation, *, out_shape=None, **_) -> int:
    return 2 * x_nd[0] * (w_in[0] * w_in[1] + w_out[0] * w_out[1])


@register_flop_formula(torch.ops.quintic.dense_backward)
def _backward_flops(dy_nd, x_nd, w_in, w_out, h_nh, activation, output_mask, *, out_shape=None, **_) -> int:
    needs_x, needs_in, needs_out = output_mask
    return 2 * x_nd[0] * ((needs_x + needs_in) * w_in[0] * w_in[1] + (1 + needs_out) * w_out[0] * w_out[1])
