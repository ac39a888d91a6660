r"""Nystrom attention: softmax attention through m landmarks, linear in the length (post kexue.fm/archives/8180).

Softmax attention is a matrix of n x n weights of a kernel exp(q'k), which a skeleton of m rows and columns describes:

    softmax(Q K') V  ~  softmax(Q K~') [softmax(Q~ K~')]^+ softmax(Q~ K') V

with landmarks Q~, K~ (Xiong et al. 2021, arXiv 2102.03902: means of m segments of the sequence). The usual iteration
for the pseudo-inverse scales by a maximum over the whole batch, so that an answer depends on the batch mates, and stops
after six steps, far from the pseudo-inverse. That is as well: landmarks are no rows and columns of the matrix itself,
and the true pseudo-inverse blows up what they miss (``python -m benchmarks nystrom_attention``: errors of 100 % and
more on a trained model's heads). Here every matrix is inverted by itself in double precision, with a ridge in the place
of the early stop:

    A^+ -> (A'A + (ridge |A|)^2 I)^-1 A',   |A|^2 = |A|_1 |A|_inf

``ridge=0`` is the pseudo-inverse, cut at 1e-6 of the largest singular value, with |A Z A - A| <= 1e-5 |A|. The default
suits sequences that change slowly; rough ones want a larger ridge. On a trained model's heads every variant is far
from exact attention: measure before putting it in the place of attention that was trained without it.

There is no causal form: a landmark is a mean over a segment, and would tell the past of the future.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.core.precision import in_float64
from quintic.lowrank.result import whole_number

__all__ = ["NystromAttention", "nystrom_attention"]

_CUT = 1e-6


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: int,
    *,
    ridge: float = 0.01,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of n queries to n keys through landmarks.

    Args:
        q: (..., n, d) queries; the scale 1 / sqrt(d) is applied here.
        k: (..., n, d) keys of the same tokens.
        v: (..., n, e) values.
        landmarks: m; from the number of tokens on, attention is exact.
        ridge: Of the inverse among landmarks, see above; 0, or 1e-6 to 1.
        mask: (..., n) bool, broadcast over the leading axes of q: which tokens are there (True) and not padding.
        causal: Refused.

    Returns:
        (..., n, e), of the dtype of v; rows of padding are undefined but finite.

    Raises:
        ConfigError: ``causal``, a ridge out of range, or shapes or landmarks that do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 256, 16, generator=torch.Generator().manual_seed(0))
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> near = nystrom_attention(q, k, v, landmarks=64)
        >>> near.shape == exact.shape
        True
    """
    if causal:
        raise ConfigError("Nystrom attention has no causal form (its landmarks see the future); use exact attention")
    if q.ndim < 2:
        raise ConfigError(f"expected queries (..., n, d), found {tuple(q.shape)}")
    n, d = q.shape[-2:]
    if k.shape != q.shape or v.shape[:-1] != k.shape[:-1]:
        raise ConfigError(f"expected keys like the queries {tuple(q.shape)} and as many values, found keys "
                          f"{tuple(k.shape)}, values {tuple(v.shape)}")  # fmt: skip
    landmarks = whole_number(landmarks, None, "landmarks")
    if ridge and not _CUT <= ridge <= 1.0:  # its square is added to a squared matrix: less drowns in rounding
        raise ConfigError(f"ridge must be 0, or lie between {_CUT:g} and 1; found {ridge}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape[-1] != n):
        raise ConfigError(f"expected a mask (..., {n}) of bool, found {mask.dtype} {tuple(mask.shape)}")
    if mask is not None and not mask.any(dim=-1).all():
        raise ConfigError("the mask leaves a sequence without tokens")
    if n <= landmarks:
        allowed = None if mask is None else mask[..., None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    dtype = torch.promote_types(q.dtype, torch.float32)  # weights of bfloat16 could not be inverted
    q, k = q.to(dtype) * d**-0.5, k.to(dtype)
    near_q, near_k = (_segment_means(x, landmarks, mask) for x in (q, k))
    to_landmarks = torch.softmax(q @ near_k.mT, dim=-1)
    among = torch.softmax(near_q @ near_k.mT, dim=-1)
    scores = near_q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, :], float("-inf"))
    gathered = torch.softmax(scores, dim=-1) @ v.to(dtype)
    return (to_landmarks @ (_inverse(among, ridge) @ in_float64(gathered)).to(gathered)).to(v.dtype)


def _inverse(A: Tensor, ridge: float) -> Tensor:
    """Regularised pseudo-inverse of each matrix by itself, float64."""
    A = in_float64(A)
    if not ridge:
        return torch.linalg.pinv(A, rtol=_CUT)
    size = A.abs().sum(-1).amax(-1) * A.abs().sum(-2).amax(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(A.mT @ A + (ridge**2 * size)[..., None, None] * eye, A.mT)


def _segment_means(x: Tensor, m: int, mask: Tensor | None) -> Tensor:
    """(..., m, d): means of m runs of neighbouring tokens, of nearly equal length; padding is left out."""
    n = x.shape[-2]
    if mask is None:
        count = torch.full((1,), n, device=x.device)
        sums = in_float64(x).cumsum(-2)
    else:
        count = mask.sum(-1, keepdim=True)
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # tokens first, in their order
        order = order[..., None].expand(x.shape)
        sums = in_float64(x.gather(-2, order)).cumsum(-2)
    sums, count = F.pad(sums, (0, 0, 1, 0)), count.to(sums.device)
    number = torch.arange(m, device=sums.device)
    start = number * count // m
    # With fewer tokens than landmarks a segment is one token, and some stand for two.
    end = torch.maximum((number + 1) * count // m, start + 1)
    start, end = (at.expand(*x.shape[:-2], m)[..., None] for at in (start, end))
    wide = (*x.shape[:-2], m, x.shape[-1])
    total = sums.gather(-2, end.expand(wide)) - sums.gather(-2, start.expand(wide))
    return (total / (end - start)).to(x)


class NystromAttention(nn.Module):
    """Multi-head self-attention through landmarks, for sequences that may see themselves whole.

    Args:
        d_model: Width.
        num_heads: Heads, of width d_model / num_heads.
        landmarks: See :func:`nystrom_attention`.
        ridge: Likewise.
        bias: Whether projections have one.

    Raises:
        ConfigError: The heads do not divide the width.

    Example:
        >>> attention = NystromAttention(32, 4, landmarks=16)
        >>> attention(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])
    """

    def __init__(
        self, d_model: int, num_heads: int, landmarks: int = 64, *, ridge: float = 0.01, bias: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ConfigError(f"{num_heads} heads do not divide a width of {d_model}")
        self.num_heads, self.landmarks, self.ridge = num_heads, whole_number(landmarks, None, "landmarks"), ridge
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, n, d_model) to the same; ``mask`` (b, n) bool is True for tokens and False for padding."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        per_head = None if mask is None else mask[:, None]
        mixed = nystrom_attention(q, k, v, self.landmarks, ridge=self.ridge, mask=per_head)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width))
