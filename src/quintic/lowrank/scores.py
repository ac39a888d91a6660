"""Columns chosen by a score of their own or by lot, without regard to one another (post kexue.fm/archives/10662).

Rules of the contract of :mod:`quintic.lowrank.pivots`. They are simple and cheap, and may choose the same direction
twice; take them for what they say about columns rather than for the error they reach.

==================  ================================================================================
norms_top           the longest columns
norms_sampled       by lot, with odds |a_j|^2
leverage_top        the largest leverage h_j = |V[j, :gamma]|^2, V the right singular vectors
leverage_sampled    by lot, with odds h_j
leverage_ridge      the largest a_j' (A A' + lambda I)^-1 a_j
k_means             the column nearest to each of k cluster centres
uniform             by lot, all equal
subsampled          pivoted QR on a uniform sample ("Optim-RID", arXiv 2105.07076)
==================  ================================================================================

All lots are drawn without replacement.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.core.precision import in_float64
from quintic.linalg.sketch import OVERSAMPLING, Operator, dominant, safe_scale, seeded, sketch_rows
from quintic.lowrank.pivots import pivoted_qr, prepared

__all__ = [
    "k_means",
    "leverage",
    "leverage_ridge",
    "leverage_sampled",
    "leverage_top",
    "norms_sampled",
    "norms_top",
    "subsampled",
    "uniform",
]

_LLOYD_STEPS = 25


def norms_top(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The k longest columns."""
    return _largest(torch.linalg.vector_norm(prepared(A, k), dim=-2), k)


def norms_sampled(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """By lot, with odds proportional to the squared length."""
    return _drawn(torch.linalg.vector_norm(prepared(A, k), dim=-2).square(), k, seed)


def leverage(A: Tensor, gamma: int, *, seed: int = 0) -> Tensor:
    """h_j = |V[j, :gamma]|^2, the share of column j in the gamma dominant directions: (..., n), of sum gamma."""
    return torch.linalg.vector_norm(dominant(prepared(A, gamma), gamma, seed=seed).Vh, dim=-2).square()


def leverage_top(A: Tensor, k: int, *, seed: int = 0, gamma: int | None = None) -> Tensor:
    """The k largest leverages in gamma dominant directions; ``None`` takes gamma = k."""
    return _largest(leverage(prepared(A, k), gamma or k, seed=seed), k)


def leverage_sampled(A: Tensor, k: int, *, seed: int = 0, gamma: int | None = None) -> Tensor:
    """By lot, with odds proportional to the leverage in gamma dominant directions; ``None`` takes gamma = k."""
    return _drawn(leverage(prepared(A, k), gamma or k, seed=seed), k, seed)


def leverage_ridge(A: Tensor, k: int, *, seed: int = 0, ridge: float | None = None) -> Tensor:
    """The k largest a_j' (A A' + ridge I)^-1 a_j = sum_i sigma_i^2 / (sigma_i^2 + ridge) |V[j, i]|^2.

    Args:
        A: (..., m, n).
        k: Columns to choose.
        seed: Of the sketch.
        ridge: lambda; its scale is that of A squared. ``None`` takes ||A - A_k||_F^2 / k, with which the leverages sum
            to at most 2 k. A matrix whose shorter side is above 8 k + 80 is seen through its 2 k + 20 dominant
            directions.
    """
    if ridge is not None and not ridge > 0:
        raise ConfigError(f"ridge must be positive, found {ridge}")
    M = prepared(A, k)
    short = min(M.shape[-2:])
    size = 2 * (k + OVERSAMPLING)
    _, S, Vh = dominant(M, short if short <= 4 * size else size, seed=seed)
    top = torch.where(S[..., :1] > 0, S[..., :1], 1.0)
    power = (S / top).square()
    if ridge is None:
        whole = (torch.linalg.vector_norm(M, dim=(-2, -1)).unsqueeze(-1) / top).square()
        weight = (whole - power[..., :k].sum(-1, keepdim=True)).clamp_min(0) / k
    else:
        scale = safe_scale(A.detach())
        root = ridge**0.5 / (scale.squeeze(-1) if isinstance(scale, Tensor) else scale)
        weight = (root / top).square()  # may be 0 or infinite, of which the shares are the limits
    kept = power > torch.finfo(power.dtype).eps  # a matrix of rank k leaves no ridge
    # Shares, times the weight where it is large: a common factor does not matter, but all of them could underflow.
    share = torch.where(weight > 1, power / (power / weight + 1), power / (power + weight))
    return _largest((torch.where(kept, share, 0.0).unsqueeze(-1) * Vh.abs().square()).sum(-2), k)


def k_means(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Lloyd's clusters of the columns, and the column nearest to each centre that no other centre took.

    Columns longer than 4 k + 20 are sketched to half of that, which keeps their distances.
    """
    A = prepared(A, k)
    size = 2 * k + OVERSAMPLING
    if A.shape[-2] > 2 * size:  # else a sketch would save little
        A = sketch_rows(A, size, seed=seed)
    points = A.mT
    if A.is_complex():
        points = torch.view_as_real(points.resolve_conj()).flatten(-2)
    return _each(points, lambda P: _nearest_to_centres(P, k, seed))


def uniform(A: Tensor | Operator, k: int, *, seed: int = 0) -> Tensor:
    """Any k different columns."""
    A = prepared(A, k)
    order = torch.randperm(A.shape[-1], generator=seeded(seed), device="cpu")[:k]
    return order.to(getattr(A, "device", None)).expand(*A.shape[:-2], k)


def subsampled(
    A: Tensor, k: int, *, seed: int = 0, size: int | None = None, rule: Callable[..., Tensor] = pivoted_qr
) -> Tensor:
    """Another rule on a uniform sample of the columns: quick on huge matrices, blind to rare columns.

    Args:
        A: (..., m, n).
        k: Columns to choose.
        seed: Of the sample, and for the rule.
        size: Columns in the sample; ``None`` is 4 k + 10, or all of fewer.
        rule: Any function of the contract.
    """
    A = prepared(A, k)
    size = min(A.shape[-1], 4 * k + OVERSAMPLING) if size is None else size
    if not k <= size <= A.shape[-1]:
        raise ConfigError(f"a sample of {size} columns; expected {k} to {A.shape[-1]}")
    sample = uniform_sample(A.shape[-1], size, seed).to(A.device)
    return sample[rule(A[..., sample], k, seed=seed)]


def uniform_sample(count: int, size: int, seed: int) -> Tensor:
    """Positions below ``count``, in ascending order."""
    return torch.randperm(count, generator=seeded(seed), device="cpu")[:size].sort().values


def _largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest, the first of equals first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def _drawn(odds: Tensor, k: int, seed: int) -> Tensor:
    """k draws without replacement (Efraimidis and Spirakis): the k smallest of independent Exp(1) / odds."""
    u = torch.rand(odds.shape[-1], generator=seeded(seed), dtype=torch.float64, device="cpu")
    wide = in_float64(odds)
    keys = torch.where(wide > 0, -torch.log1p(-u.to(wide.device)) / wide, torch.inf)
    return keys.argsort(dim=-1, stable=True)[..., :k].to(odds.device)


def _each(batch: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    chosen = torch.stack([choose(matrix) for matrix in batch.reshape(-1, *batch.shape[-2:])])
    return chosen.reshape(*batch.shape[:-2], chosen.shape[-1])


def _nearest_to_centres(P: Tensor, k: int, seed: int) -> Tensor:
    """P (n, d): the points nearest to the centres of k clusters, begun as k-means++ does."""
    u = torch.rand(k, generator=seeded(seed), dtype=torch.float64, device="cpu")
    first = min(int(u[0] * len(P)), len(P) - 1)
    centres = [P[first]]
    nearest = (P - centres[0]).square().sum(-1)
    for t in range(1, k):
        reach = in_float64(nearest).cumsum(0).cpu()
        at = int(torch.searchsorted(reach, u[t] * reach[-1]).clamp_max(len(P) - 1))
        centres.append(P[at])
        nearest = torch.minimum(nearest, (P - P[at]).square().sum(-1))
    C = torch.stack(centres)
    for _ in range(_LLOYD_STEPS):
        owner = torch.cdist(P, C).argmin(-1)
        sums = torch.zeros_like(C).index_add_(0, owner, P)
        counts = torch.bincount(owner, minlength=k).unsqueeze(-1)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), C)
        if torch.equal(moved, C):
            break
        C = moved
    distance = torch.cdist(C, P)
    chosen = []
    for row in distance:
        chosen.append(row.argmin())
        distance[:, chosen[-1]] = torch.inf
    return torch.stack(chosen)
