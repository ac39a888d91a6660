"""Latent attention on a CPU from the residual stream to the residual stream, by the C kernels of ``mla.c``.

Norm, projections, attention, output and sum are one step of autograd: normalised rows stay in the cache, the gradients
that meet are not added in passes of their own, and Python is asked once instead of ten times. Kept for the backward
pass, beside x: queries, latents, keys and values, what attention mixed, and a number per row of each norm and softmax.

Legend: b batch, t time, h heads, n width of keys without position, p their rotated part, v values, r latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintic.core.kernels import fits_kernels, found_kernels
from quintic.core.operators import operator
from quintic.lm.attention import fits_causal_attention
from quintic.lm.config import LMConfig

__all__ = ["fits_latent_attention", "fused_latent_attention"]

_ROWS = 8  # for each column: a task has gradients of all weights, and as many rows as there are columns


def fits_latent_attention(x_btd: Tensor, rotation: Tensor, weights: Sequence[Tensor], config: LMConfig) -> bool:
    """Whether :func:`fused_latent_attention` is for this.

    That is what :func:`quintic.lm.attention.fits_causal_attention` asks, and eight times as many tokens as columns. Not
    under autocast, which multiplies in another dtype.

    Args:
        x_btd: As there.
        rotation: As there.
        weights: As there.
        config: As there.
    """
    c, tokens = config, x_btd.shape[0] * x_btd.shape[1]
    return (
        tokens >= _ROWS * max(c.d_model, c.kv_rank, c.num_heads * c.v_dim)
        and fits_causal_attention(x_btd, x_btd, x_btd, rotation)
        and fits_kernels(*weights)
        and not torch.is_autocast_enabled("cpu")
    )


def fused_latent_attention(
    x_btd: Tensor, rotation: Tensor, weights: Sequence[Tensor], eps: tuple[float, float], config: LMConfig
) -> Tensor:
    """x plus the attention of norm(x); once differentiable.

    Args:
        x_btd: (batch, time, width) residual stream.
        rotation: (time, (n + p) / 2) complex64 of :func:`quintic.lm.rope.rotation_table`.
        weights: Gain of the first norm, q, kv_down, gain of the latents' norm, kv_up, out.
        eps: Of the two norms.
        config: Sizes.
    """
    c = config
    sizes = [c.num_heads, c.qk_nope_dim, c.qk_rope_dim, c.v_dim, c.kv_rank]
    y_btd: Tensor = _LatentAttention.apply(x_btd, rotation, sizes, eps, *weights)  # type: ignore[assignment]
    return y_btd


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_btd: Tensor, rotation: Tensor, sizes: list[int], eps: tuple[float, float], *weights: Tensor
    ) -> Tensor:
        y_btd, *kept = _attend(x_btd, rotation, weights, sizes, *eps)
        ctx.save_for_backward(x_btd, rotation, *weights, *kept)
        ctx.sizes = sizes
        return y_btd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_btd, rotation, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        dx_btd, *found = _attend_backward(grad_outputs[0], x_btd, rotation, saved[:6], saved[6:], ctx.sizes, needed)
        return dx_btd, None, None, None, *(g if on else None for g, on in zip(found, needed, strict=True))


def _forward(
    x_btd: Tensor, rotation: Tensor, weights: list[Tensor], sizes: list[int], eps_x: float, eps_z: float
) -> list[Tensor]:
    """y, and what is kept: r of both norms, q, latent, rotated key, kv, mixed, logarithms of the denominators."""
    x_btd, rotation, *weights = (t.contiguous() for t in (x_btd, rotation, *weights))
    y_btd, *kept = made = _fake_forward(x_btd, rotation, weights, sizes, eps_x, eps_z)
    found_kernels().call(
        "latent_attention", *x_btd.shape, *sizes, _scale(sizes), eps_x, eps_z, x_btd, *weights, rotation, *kept, y_btd
    )
    return made


def _backward(
    dy_btd: Tensor,
    x_btd: Tensor,
    rotation: Tensor,
    weights: list[Tensor],
    kept: list[Tensor],
    sizes: list[int],
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x and of the weights, empty for those that nobody needs."""
    dy_btd, x_btd, rotation, *weights = (t.contiguous() for t in (dy_btd, x_btd, rotation, *weights))
    made = _fake_backward(dy_btd, x_btd, rotation, weights, kept, sizes, needed)
    asked = (g if g.numel() else None for g in made)
    found_kernels().call(
        "latent_attention_backward",
        *x_btd.shape,
        *sizes,
        _scale(sizes),
        x_btd,
        *weights,
        rotation,
        *kept,
        dy_btd,
        *asked,
    )
    return made


def _scale(sizes: Sequence[int]) -> float:
    return (sizes[1] + sizes[2]) ** -0.5


def _fake_forward(x_btd, rotation, weights, sizes, eps_x, eps_z):
    (b, t, d), (h, n, p, v, r) = x_btd.shape, sizes
    widths = (1, 1, h * (n + p), r, p, h * (n + v), h * v)
    return [*(x_btd.new_empty(b, t, width) for width in (d, *widths)), x_btd.new_empty(b, h, t)]


def _fake_backward(dy_btd, x_btd, rotation, weights, kept, sizes, needed):
    return [
        x_btd.new_empty(x_btd.shape),
        *(w.new_empty(w.shape if on else 0) for w, on in zip(weights, needed, strict=True)),
    ]


# Attention itself is not counted, as in quintic.lm.attention.
def _forward_flops(x_btd, rotation, weights, sizes, eps_x, eps_z) -> int:
    return 2 * x_btd[0] * x_btd[1] * sum(w[0] * w[1] for w in weights if len(w) == 2)


def _backward_flops(dy_btd, x_btd, rotation, weights, kept, sizes, needed) -> int:
    pairs = zip(weights, needed, strict=True)
    return 2 * x_btd[0] * x_btd[1] * sum((1 + on) * w[0] * w[1] for w, on in pairs if len(w) == 2)


_attend = operator(
    "latent_attention(Tensor x, Tensor rotation, Tensor[] weights, int[] sizes, float eps_x, float eps_z) -> Tensor[]",
    _forward, _fake_forward, _forward_flops,
)  # fmt: skip
_attend_backward = operator(
    "latent_attention_backward(Tensor dy, Tensor x, Tensor rotation, Tensor[] weights, Tensor[] kept, int[] sizes,"
    " bool[] needed) -> Tensor[]",
    _backward, _fake_backward, _backward_flops,
)  # fmt: skip
