"""CR: a product X Y from a few columns of X and the same rows of Y (post kexue.fm/archives/10427).

    X Y = sum_i x_i y_i' ~ sum_{i in S} lambda_i x_i y_i' = C Lambda R,   C = X[:, S],   R = Y[S, :]

Choice of S, by the norms |v_i| = |x_i| |y_i| of the terms:

* top: the r largest |v_i|, the best for terms at right angles;
* sampled: r independent draws with p_i = |v_i| / sum |v|, which makes lambda_i = 1 / (r p_i) unbiased with the least
  variance, ((sum |v_i|)^2 - |sum v_i|^2) / r;
* tuples: throw away, t at a time, the terms whose sum is the smallest; t = 1 is top.

Middle: as chosen (ones or the weights of the draws); diagonal, lambda = [(C'C) o (RR')^T]^+ [(C'X) o (Y R')^T] 1 with
o the elementwise product; full, C^+ X Y R^+, which is the projection of X Y on C and R.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from quintic.core import ConfigError, DataError, suggest
from quintic.core.precision import in_float64
from quintic.linalg.sketch import seeded
from quintic.lowrank.matrices import frobenius
from quintic.lowrank.result import Approximation, whole_number
from quintic.lowrank.source import PART, Dense, Source, as_source

__all__ = ["CHOICES", "MIDDLES", "ProductSkeleton", "cr"]

CHOICES = ("top", "sampled", "tuples")
MIDDLES = ("as chosen", "diagonal", "full")
_MOST_TUPLES = 2_000_000


@dataclass(frozen=True, eq=False, repr=False)
class ProductSkeleton(Approximation):
    """X Y ~ C Lambda R."""

    indices: Any
    """(r,): the chosen terms; draws may repeat one."""
    C: Any
    """(n, r): columns of X."""
    R: Any
    """(r, m): rows of Y."""
    weights: Any
    """(r,): the diagonal of Lambda; None for the full middle."""
    middle: str
    """``as chosen``, ``diagonal`` or ``full``."""


def cr(
    X: Any,
    Y: Any,
    rank: int,
    *,
    method: str = "top",
    middle: str = "as chosen",
    size: int = 2,
    seed: int = 0,
) -> ProductSkeleton:
    """Approximate X Y by r of its l terms, at r / l of the cost.

    Args:
        X: (n, l), tensor or numpy array.
        Y: (l, m), of the same kind.
        rank: r, 1 to l.
        method: ``top``, ``sampled`` or ``tuples``.
        middle: ``as chosen``, ``diagonal`` (best weights) or ``full`` (best r x r middle); the last two need X Y's
            projections, O(l r (n + m)) and O(n l m).
        size: Terms thrown away at a time by ``tuples``; C(l, size) sums are looked at.
        seed: Of the draws.

    Raises:
        ConfigError: An argument is unusable, or there are more than 2 million tuples to look at.
        DataError: X or Y is no matrix, they do not fit, an element is not finite, or the product is out of range.

    Example:
        >>> X, Y = torch.eye(3), torch.diag(torch.tensor([1.0, 5.0, 3.0]))
        >>> cr(X, Y, 2).indices
        tensor([1, 2])
    """
    if method not in CHOICES:
        raise ConfigError(f"unknown method {method!r}{suggest(str(method), CHOICES)}")
    if middle not in MIDDLES:
        raise ConfigError(f"unknown middle {middle!r}{suggest(str(middle), MIDDLES)}")
    source = _Product(X, Y)
    x, y = source.x, source.y
    terms = x.shape[1]
    rank = whole_number(rank, terms, "rank", ", the number of terms of the product")
    norms = torch.linalg.vector_norm(x.detach(), dim=0) * torch.linalg.vector_norm(y.detach(), dim=1)
    reach, largest = torch.finfo(norms.dtype), float(norms.sum()) * float(source.scale)
    if norms.any() and not reach.tiny < largest < reach.max:
        raise DataError(f"the product of X and Y leaves the range of {source.dtype}; scale one of them")
    weights = torch.ones(rank, dtype=x.dtype, device=x.device)
    if method == "top":
        at = norms.argsort(dim=0, descending=True, stable=True)[:rank]
    elif method == "tuples":
        at = _without_small_tuples(x.detach(), y.detach(), rank, size)
    else:
        at, weights = _drawn(norms, rank, seed, weights)
    C, R = x[:, at], y[at]
    if middle == "diagonal":
        at, C, R = _distinct(at, x, y)
        weights = _best_weights(C, R, x, y)
    if middle == "full":
        at, C, R = _distinct(at, x, y)
        weights = None
        Q_C, Q_R = torch.linalg.qr(C).Q, torch.linalg.qr(R.mH).Q
        left, right = Q_C @ ((Q_C.mH @ x) @ (y @ Q_R)), Q_R.mH
    else:
        left, right = C * weights, R
    a, b = source.scales
    parts = (left * (a * b), right, at, C * a, R * b)
    left, right, at, C, R = (source.out(part) for part in parts)
    kept = None if weights is None else source.out(weights)
    return ProductSkeleton(left, right, f"{method}", source, at, C, R, kept, middle)


class _Product(Source):
    """X Y, never formed as a whole."""

    def __init__(self, X: Any, Y: Any) -> None:
        first, second = as_source(X), as_source(Y)
        if not (isinstance(first, Dense) and isinstance(second, Dense)) or len(first.shape) + len(second.shape) != 4:
            raise DataError("cr multiplies two matrices in memory, tensors or numpy arrays without a batch")
        if first.shape[1] != second.shape[0]:
            raise DataError(f"cannot multiply shapes {first.shape} and {second.shape}")
        self.dtype = torch.promote_types(first.dtype, second.dtype)
        self.x, self.y = first.tensor.to(self.dtype), second.tensor.to(self.dtype)
        self.scales = (first.scale, second.scale)
        self.scale = first.scale * second.scale
        self.shape, self.device = (first.shape[0], second.shape[1]), first.device
        self.returns_tensors = first.returns_tensors

    def matmat(self, X: Tensor, /) -> Tensor:
        return self.x @ (self.y @ X)

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return self.y.mH @ (self.x.mH @ X)

    def columns(self, at: Tensor) -> Tensor:
        return self.x @ self.y[:, at] * self.scale

    def rows(self, at: Tensor) -> Tensor:
        return self.x[at] @ self.y * self.scale

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        left = left / self.scale
        terms = self.x.shape[1]
        if terms + left.shape[1] < min(self.shape):
            # X Y - L R = (X, -L) (Y; R), of which two triangles keep the norm.
            T = torch.linalg.qr(torch.cat([self.x, -left], 1), mode="r").R
            S = torch.linalg.qr(torch.cat([self.y, right]).mH, mode="r").R
            return frobenius(T @ S.mH), frobenius(T[:, :terms] @ S[:, :terms].mH)
        off, whole = [], []
        height = max(1, PART // self.shape[1])
        for x, part in zip(self.x.split(height), left.split(height), strict=True):
            product = x @ self.y
            whole.append(frobenius(product))
            off.append(frobenius(product - part @ right))
        return torch.linalg.vector_norm(torch.stack(off)), torch.linalg.vector_norm(torch.stack(whole))


def _drawn(norms: Tensor, rank: int, seed: int, ones: Tensor) -> tuple[Tensor, Tensor]:
    total = norms.sum()
    if total == 0:
        return torch.arange(rank, device=norms.device), ones
    reach = (in_float64(norms).cumsum(0) / in_float64(total)).cpu()
    u = torch.rand(rank, generator=seeded(seed), dtype=torch.float64, device="cpu")
    at = torch.searchsorted(reach, u * reach[-1], right=True).clamp_max(len(norms) - 1).to(norms.device)
    return at, (total / (rank * norms[at])).to(ones.dtype)


def _without_small_tuples(x: Tensor, y: Tensor, rank: int, size: int) -> Tensor:
    """What is left when ``size`` terms at a time, those with the smallest sum, have been thrown away."""
    terms = x.shape[1]
    size = whole_number(size, None, "size")
    if comb(terms, size) > _MOST_TUPLES:
        raise ConfigError(f"{comb(terms, size):,} tuples of {size} out of {terms} terms; take a smaller size, or 'top'")
    gram = ((x.mH @ x) * (y @ y.mH).mT).real  # <v_i, v_j>
    alive = torch.ones(terms, dtype=torch.bool, device=x.device)
    whole, single = divmod(terms - rank, size)
    if whole:
        tuples = torch.tensor(list(combinations(range(terms), size)), device=x.device)
        sums = torch.zeros(len(tuples), dtype=gram.dtype, device=x.device)
        for a in range(size):
            for b in range(size):
                sums += gram[tuples[:, a], tuples[:, b]]
        tuples = tuples[sums.argsort(stable=True)]
        for _ in range(whole):
            first = alive[tuples].all(-1).int().argmax()
            alive[tuples[first]] = False
    for _ in range(single):
        alive[gram.diagonal().masked_fill(~alive, torch.inf).argmin()] = False
    return alive.nonzero().squeeze(-1)


def _distinct(at: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen terms, each once."""
    if len(once := at.unique()) < len(at):
        at = once
    return at, x[:, at], y[at]


def _best_weights(C: Tensor, R: Tensor, x: Tensor, y: Tensor) -> Tensor:
    gram = (C.mH @ C) * (R @ R.mH).mT
    seen = ((C.mH @ x) * (y @ R.mH).mT).sum(-1)
    # Terms of unit length, so that what counts as dependent does not depend on their sizes.
    unit = gram.diagonal().real.sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    inverse = torch.linalg.pinv(
        gram / unit / unit.unsqueeze(-1), hermitian=True, rtol=len(unit) * torch.finfo(unit.dtype).eps
    )
    return inverse @ (seen / unit) / unit
