"""Causal attention of one piece on a CPU: from the outputs of the projections to the mixed values, and back.

With turned queries and keys, as in :mod:`quintic.lm.mla`, and scale s,

    p = softmax over earlier keys of s q k',   o = p v
    dv = p' do,   ds = p (do v' - <do, o>),   dq = s ds k,   dk = s ds' q

the C kernels of ``attention.c`` keep, beside what the projections made, o and the logarithm of each softmax's
denominator, and form p again in the backward pass (Dao et al., FlashAttention, arXiv 2205.14135). Nothing is turned,
transposed, widened or padded in memory, and nothing beyond the diagonal is computed. Weights below 2^-100 are 0. The
gradient of the one key part that all heads share is summed in the order of the heads; no bit of any result depends on
the number of threads, on other sequences of the batch or, for outputs, on later tokens.

It gains most where sequences are short. Where the keys of one head are more than 4096 * 128 numbers, too many for the
second cache, it gains nothing any more, and torch's operators do it.

Legend: b batch, t time, h heads, n width of queries and keys without position, p width of their rotated part, v width
of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintic.core.kernels import fits_kernels, found_kernels, load_kernels
from quintic.core.operators import operator

__all__ = ["causal_attention", "fits_causal_attention"]

# Beyond, a block's logits or a head's keys and values leave the second cache.
_TOKENS, _NUMBERS = 8192, 4096 * 128


def fits_causal_attention(q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor) -> bool:
    """Whether :func:`causal_attention` is for this: float32 on a CPU with kernels, and not too long.

    That is at most 8192 tokens, and 4096 * 128 numbers in the keys of one head.

    Args:
        q: As there.
        kv: As there, or the latent that it is made of.
        rope_key: As there.
        rotation: As there.
    """
    plain = fits_kernels(q, kv, rope_key) and type(rotation) is Tensor and rotation.dtype == torch.complex64
    if not plain or rotation.device != q.device or not q.numel():
        return False
    time = len(rotation)
    short = time == q.shape[1] and time <= _TOKENS and 2 * rotation.numel() <= _NUMBERS
    return short and load_kernels() is not None


def causal_attention(q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor, scale: float) -> Tensor:
    """Every token's mixture of the values of itself and earlier tokens; once differentiable.

    Args:
        q: (batch, time, heads * (n + p)) queries, not yet turned.
        kv: (batch, time, heads * (n + v)); for each head the part of its keys without position, then its values.
        rope_key: (batch, time, p) the other part of the keys of all heads, not yet turned.
        rotation: (time, (n + p) / 2) complex64 of :func:`quintic.lm.rope.rotation_table`, for queries and keys.
        scale: Factor of the logits.

    Returns:
        (batch, time, heads * v).
    """
    out: Tensor = _CausalAttention.apply(q, kv, rope_key, rotation, scale)  # type: ignore[assignment]
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor, scale: float) -> Tensor:
        out, lse = _attend(q, kv, rope_key, rotation, scale)
        ctx.save_for_backward(q, kv, rope_key, rotation, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        return *_attend_backward(grad_outputs[0], *saved, ctx.scale), None, None


def _forward(q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mixed values, and (batch, heads, time) logarithms to base 2 of the denominators."""
    q, kv, rope_key, rotation = _readable(q, kv, rope_key, rotation)
    sizes, kernels = _sizes(q, kv, rope_key, rotation), found_kernels()
    out, lse = _fake_forward(q, kv, rope_key, rotation, scale)
    kernels.call("attention", *sizes, rope_key.stride(1), float(scale), q, kv, rope_key, rotation, out, lse)
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rope_key: Tensor,
    rotation: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and rope_key."""
    q, kv, rope_key, rotation = _readable(q, kv, rope_key, rotation)
    sizes, kernels = _sizes(q, kv, rope_key, rotation), found_kernels()
    dq, dkv, drope_key = _fake_backward(dout, q, kv, rope_key, rotation, out, lse, scale)
    kernels.call(
        "attention_backward", *sizes, rope_key.stride(1), float(scale), q, kv, rope_key, rotation,
        out, lse, dout.contiguous(), dq, dkv, drope_key,
    )  # fmt: skip
    return dq, dkv, drope_key


def _readable(q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
    """As the kernels read them. The rotated key may be columns of a wider matrix, as a projection's output has them."""
    rows = rope_key.stride(2) == 1 and rope_key.stride(0) == rope_key.shape[1] * rope_key.stride(1)
    return q.contiguous(), kv.contiguous(), rope_key if rows else rope_key.contiguous(), rotation.contiguous()


def _sizes(q: Tensor, kv: Tensor, rope_key: Tensor, rotation: Tensor) -> tuple[int, ...]:
    """b, t, h, n, p and v."""
    (b, t, p), e = rope_key.shape, 2 * rotation.shape[1]
    h = q.shape[2] // e
    return b, t, h, e - p, p, kv.shape[2] // h - (e - p)


def _fake_forward(q, kv, rope_key, rotation, scale):
    b, t, h, _, _, v = _sizes(q, kv, rope_key, rotation)
    return q.new_empty(b, t, h * v), q.new_empty(b, h, t)


def _fake_backward(dout, q, kv, rope_key, rotation, out, lse, scale):
    return q.new_empty(q.shape), kv.new_empty(kv.shape), rope_key.new_empty(rope_key.shape)


# Without a count of FLOPs: FlopCounterMode counts nothing either for torch's own attention on a CPU.
_attend = operator(
    "causal_attention(Tensor q, Tensor kv, Tensor rope_key, Tensor rotation, float scale) -> (Tensor, Tensor)",
    _forward, _fake_forward,
)  # fmt: skip
_attend_backward = operator(
    "causal_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor rope_key, Tensor rotation, Tensor out,"
    " Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
