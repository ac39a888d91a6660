"""QK-clip: after the optimizer's step, shrink the queries and keys of heads whose logits have grown too large.

Post kexue.fm/archives/11126 (MuonClip is Muon followed by this; Kimi K2 used tau = 100). For head h with
S = max |q.k| over the batch, scale included, and gamma = tau / S < 1:

| attention | queries | keys |
|---|---|---|
| multi-head | W_q * sqrt(gamma) | W_k * sqrt(gamma) |
| grouped-query | W_q * gamma | untouched: other heads use them |
| latent (MLA) | W_qc * sqrt(gamma), rotated part W_qr * gamma | W_kc * sqrt(gamma), shared part W_kr untouched |

Either way every logit of that head is multiplied by gamma, and no other head changes. "Clip whatever explodes":
the weights are corrected by the very quantity that is too large, and at inference nothing is left of it.

In a training loop: :func:`max_logits` where attention is computed, the maximum over layers' micro-batches (and over
processes) kept per head, and after ``optimizer.step()`` one of the functions ending in ``_`` per layer. The momentum
is not rescaled. Attention that normalises queries and keys (QK-norm) after these weights does not need it.

Legend: b batch, h heads of queries, g heads of keys, t time of queries, s time of keys, d width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.core.precision import accumulation_dtype

__all__ = ["TAU", "clip_factors", "clip_latent_qk_", "clip_qk_", "max_logits", "split_heads"]

TAU = 100.0
"""The threshold of Kimi K2; the post found 30 harmless in small models."""

_LOGITS = 2**20  # kept at a time


@torch.no_grad()
def max_logits(
    query: Tensor, key: Tensor, *, scale: float | None = None, causal: bool = True, allowed: Tensor | None = None
) -> Tensor:
    """max |q.k| * scale of each head over the batch and all pairs that attend, in pieces of about a million logits.

    Costs the first of attention's two products once more, in the dtype of the queries, but no memory.

    Args:
        query: (b, h, t, d), rotated as in attention.
        key: (b, g, s, d) with g dividing h; the key head of query head i is i // (h / g).
        scale: Factor of the logits; ``None`` is d^(-1/2), as in scaled_dot_product_attention.
        causal: Whether query i sees keys up to s - t + i only.
        allowed: (b or 1, 1 or h, t, s) bool, True where a query may look; instead of ``causal``.

    Returns:
        (h,) float32, or float64 for such queries; 0 for a head that sees nothing. Not finite if a logit is.

    Raises:
        ConfigError: Key heads do not divide query heads, or widths differ.

    Example:
        >>> q = torch.tensor([[[[1.0], [2.0]], [[3.0], [-4.0]]]])  # two heads, two positions, width 1
        >>> max_logits(q, q, scale=1.0), max_logits(q, q[:, :1], scale=0.5)
        (tensor([ 4., 16.]), tensor([2., 4.]))
    """
    b, h, t, d = query.shape
    g, s = key.shape[1], key.shape[2]
    if h % g or key.shape[0] != b or key.shape[3] != d:
        raise ConfigError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not fit; expected (b, h, t, d) and "
            "(b, g, s, d) with g dividing h"
        )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    found = torch.zeros(h, dtype=dtype, device=query.device)
    rows = max(1, _LOGITS // max(1, h * s))
    for i in range(b):
        grouped = query[i].unflatten(0, (g, h // g))
        for start in range(0, t, rows):
            logits = (grouped[:, :, start : start + rows] @ key[i].unsqueeze(1).mT).flatten(0, 1).abs()
            if allowed is not None:
                seen = allowed[i if len(allowed) > 1 else 0][:, start : start + rows]
                logits = logits.masked_fill(~seen, 0.0)
            elif causal:
                logits = logits.tril(s - t + start)
            if logits.numel():
                found = torch.maximum(found, logits.amax((1, 2)).to(dtype))
    return found * (d**-0.5 if scale is None else scale)


def clip_factors(largest: Tensor, tau: float = TAU) -> Tensor:
    """gamma = min(1, tau / S) of each head, float64 where the device has it; 1 for a head whose S is not finite.

    A batch whose logits are not finite says nothing about the weights, and Muon leaves out such a step by itself.

    Args:
        largest: S of :func:`max_logits`, (h,).
        tau: The threshold, above 0.

    Raises:
        ConfigError: ``tau`` is not a positive number.

    Example:
        >>> clip_factors(torch.tensor([50.0, 400.0, float("nan")]))
        tensor([1.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    if not 0 < tau < math.inf:
        raise ConfigError(f"tau = {tau}; expected a positive number, such as {TAU:g}")
    largest = largest.to(accumulation_dtype(largest.device))
    return torch.where(largest.isfinite() & (largest > tau), tau / largest, 1.0)


def split_heads(weight: Tensor, heads: int, *widths: int) -> tuple[Tensor, ...]:
    """Views of a projection whose rows are, head by head, parts of the given widths.

    Args:
        weight: (heads * sum(widths), inputs), or the bias (heads * sum(widths),); for a projection fused with
            others, a slice of its rows.
        heads: Number of heads.
        widths: Rows of each part of one head.

    Returns:
        For each part (heads, width, inputs), sharing memory with the weight and without a gradient.

    Raises:
        ConfigError: The rows are not as many.

    Example:
        >>> nope, rope = split_heads(torch.arange(12.0).view(6, 2), 2, 2, 1)
        >>> rope  # the last row of each head
        tensor([[[ 4.,  5.]],
                [[10., 11.]]])
    """
    if len(weight) != heads * sum(widths):
        raise ConfigError(
            f"a weight of shape {tuple(weight.shape)} has {len(weight)} rows; expected {heads} heads x "
            f"{' + '.join(map(str, widths))} = {heads * sum(widths)}"
        )
    return weight.detach().unflatten(0, (heads, -1)).split(widths, dim=1)


def clip_qk_(query: Tensor, key: Tensor, largest: Tensor, tau: float = TAU) -> Tensor:
    """QK-clip of multi-head and grouped-query attention, in place. Biases, if any, need the same call.

    Args:
        query: (h, d, inputs) of :func:`split_heads`.
        key: (g, d, inputs) likewise. With g = h both are scaled, with fewer only the queries.
        largest: (h,) of :func:`max_logits`.
        tau: The threshold.

    Returns:
        (h,) the factor on each head's logits: 1 where nothing was done.

    Raises:
        ConfigError: Numbers of heads do not fit, or ``tau`` is not positive.

    Example:
        >>> q, k = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 4, bias=False)  # 4 and 2 heads of width 2
        >>> clip_qk_(split_heads(q.weight, 4, 2)[0], split_heads(k.weight, 2, 2)[0], torch.tensor([1.0, 200, 50, 80]))
        tensor([1.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    gamma = clip_factors(largest, tau)
    _check_heads(gamma, query=query)
    if len(key) == len(query):
        _scale_heads_(query, gamma.sqrt())
        _scale_heads_(key, gamma.sqrt())
    elif len(query) % len(key) == 0:
        _scale_heads_(query, gamma)
    else:
        raise ConfigError(f"{len(query)} heads of queries cannot share {len(key)} heads of keys")
    return gamma


def clip_latent_qk_(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, largest: Tensor, tau: float = TAU) -> Tensor:
    """QK-clip of multi-head latent attention, in place; the key part that all heads share is left alone.

    For fused projections with rows [nope | rope] per head of queries and [nope key | value] per head of the
    latent's up-projection, as in :class:`quintic.lm.mla.LatentAttention`:

        q_nope, q_rope = split_heads(attention.q.weight, heads, nope_dim, rope_dim)
        k_nope, _ = split_heads(attention.kv_up.weight, heads, nope_dim, v_dim)

    Args:
        q_nope: (h, nope, inputs) queries without position.
        q_rope: (h, rope, inputs) queries that are rotated.
        k_nope: (h, nope, latent) keys of each head.
        largest: (h,) of :func:`max_logits`.
        tau: The threshold.

    Returns:
        (h,) the factor on each head's logits.

    Raises:
        ConfigError: Numbers of heads differ, or ``tau`` is not positive.

    Example:
        >>> q, kv_up = torch.nn.Linear(8, 2 * (4 + 2)), torch.nn.Linear(8, 2 * (4 + 3))
        >>> parts = (*split_heads(q.weight, 2, 4, 2), split_heads(kv_up.weight, 2, 4, 3)[0])
        >>> clip_latent_qk_(*parts, torch.tensor([400.0, 7.0]))
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    gamma = clip_factors(largest, tau)
    _check_heads(gamma, q_nope=q_nope, q_rope=q_rope, k_nope=k_nope)
    _scale_heads_(q_nope, gamma.sqrt())
    _scale_heads_(q_rope, gamma)
    _scale_heads_(k_nope, gamma.sqrt())
    return gamma


def _check_heads(gamma: Tensor, **parts: Tensor) -> None:
    for name, part in parts.items():
        if len(part) != len(gamma):
            raise ConfigError(
                f"{name} has {len(part)} heads and there are {len(gamma)} logits; see split_heads and max_logits"
            )


@torch.no_grad()
def _scale_heads_(part: Tensor, factors: Tensor) -> None:
    wide = part.dtype if part.dtype == torch.float64 else torch.float32  # half precision is rounded once
    part.mul_(factors.to(part.device, wide).view(-1, *[1] * (part.ndim - 1)))
