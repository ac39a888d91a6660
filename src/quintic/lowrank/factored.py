"""A linear layer of low rank, fitted to what it does to activations.

    min |X (W - W')'|_F = min |(W - W') T'|_F,   T'T = X'X        over W' of rank r, in one of these forms

=========  ===========================================================================================
svd        the best there is: W' = U U' W, U the leading left singular vectors of W T'
id         r rows of W as they are, the other outputs as their combinations (of least error)
cur        the same, with the combinations drawn from the span of r columns of W
svd-plain  the best approximation of W itself; X is not asked
magnitude  no low rank: the smallest elements of W are set to zero; X is not asked
=========  ===========================================================================================

A matrix (m, n) of rank r has r (m + n - r) degrees of freedom, and that is what is stored: r rows, by which the other
m - r are given. Two full factors would hold r^2 numbers more, and above r = m n / (m + n) more than W itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.lowrank.interpolation import interpolative
from quintic.lowrank.pivots import lu_pivots
from quintic.lowrank.selection import Method, select_columns
from quintic.lowrank.singular import svd

__all__ = ["FITS", "FactoredLinear", "fit_rank", "prune", "rank_of_share"]

FITS = ("svd", "id", "cur", "svd-plain")
"""Names accepted by :func:`fit_rank`."""


class FactoredLinear(nn.Module):
    """A linear layer of rank r: ``kept`` gives r outputs, of which ``rest`` makes the others.

    Args:
        d_in: n.
        d_out: m.
        rank: r, 1 to min(m, n).
        bias: Whether a constant is added.

    Example:
        >>> layer = FactoredLinear(8, 6, 2)
        >>> layer(torch.zeros(5, 8)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 6]), 30)
    """

    order: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if not 1 <= rank <= min(d_in, d_out):
            raise ConfigError(f"rank = {rank}; expected 1 to {min(d_in, d_out)} for a layer {d_in} -> {d_out}")
        self.kept = nn.Parameter(torch.empty(rank, d_in).normal_(0, d_in**-0.5))
        self.rest = nn.Parameter(torch.empty(d_out - rank, rank).normal_(0, rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.register_buffer("order", torch.arange(d_out))

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, rest: Tensor, order: Tensor, bias: Tensor | None) -> FactoredLinear:
        """The layer of given factors, in the dtype and on the device of ``weight``.

        Args:
            weight: (m, n) that is replaced.
            kept: (r, n) rows.
            rest: (m - r, r) coefficients of the other rows.
            order: (m,) outputs: the kept ones, then the others.
            bias: (m,) or None.
        """
        with weight.device:
            layer = cls(weight.shape[1], len(weight), len(kept), bias is not None).to(weight.dtype)
        with torch.no_grad():
            layer.kept.copy_(kept)
            layer.rest.copy_(rest)
            layer.order.copy_(order.argsort())
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """(m, n) the product."""
        return torch.cat([self.kept, self.rest @ self.kept])[self.order]

    def extra_repr(self) -> str:
        """Sizes."""
        rank, d_in = self.kept.shape
        return f"{d_in} -> {len(self.order)}, rank {rank}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        kept = F.linear(x, self.kept)
        y = torch.cat([kept, F.linear(kept, self.rest)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


def rank_of_share(m: int, n: int, share: float) -> int:
    """The largest rank whose r (m + n - r) parameters are at most a share of m n, at least 1.

    Example:
        >>> rank_of_share(100, 100, 0.5), rank_of_share(100, 100, 1.0)
        (29, 100)
    """
    room = math.sqrt(max(0.0, (m + n) ** 2 - 4 * share * m * n))
    return min(max(1, int((m + n - room) / 2 + 1e-9)), m, n)


def fit_rank(
    weight: Tensor, T: Tensor, rank: int, form: str, *, rule: Method = "quality", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate a matrix by one of lower rank.

    Args:
        weight: W (m, n).
        T: (n, n) with |T v| = |X v|; :meth:`quintic.lowrank.activations.Moments.factor`.
        rank: r, 1 to min(m, n).
        form: A name of :data:`FITS`.
        rule: Selection rule of ``id`` and ``cur``.
        seed: Of whatever is drawn.

    Returns:
        ``kept`` (r, n), ``rest`` (m - r, r) and ``order`` (m,), as :meth:`FactoredLinear.of` takes them.
    """
    W = weight.detach().to(T)
    if form in ("id", "cur"):
        found = interpolative(W @ T.t(), rank, side="rows", method=rule, seed=seed)
        at, left = found.indices, found.Z
        if form == "id":
            rest = _others(at, len(W))
            return W[at], left[rest], torch.cat([at, rest])
        # An input counts by its size: the columns of W as the activations weigh them.
        columns = select_columns(W * torch.linalg.vector_norm(T, dim=0), rank, method=rule, seed=seed)
        Q = torch.linalg.qr(W[:, columns]).Q
        left, right = Q @ (Q.t() @ left), W[at]
    elif form == "svd":
        left = svd(W @ T.t(), rank).U
        right = left.t() @ W
    else:
        found = svd(W, rank)
        left, right = found.U, found.S[:, None] * found.Vh
    Q, S = torch.linalg.qr(left)
    at = lu_pivots(Q)
    rest = _others(at, len(W))
    return Q[at] @ (S @ right), torch.linalg.solve(Q[at], Q[rest], left=False), torch.cat([at, rest])


def prune(weight: Tensor, share: float) -> Tensor:
    """The largest elements of a matrix, a share of all; the others zero."""
    keep = max(1, round(share * weight.numel()))
    at = weight.detach().abs().flatten().topk(keep).indices
    flat = weight.detach().flatten()
    return torch.zeros_like(flat).scatter(0, at, flat[at]).view(weight.shape)


def _others(at: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(count, dtype=torch.bool, device=at.device)
    chosen[at] = True
    return (~chosen).nonzero()[:, 0]
