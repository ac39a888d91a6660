"""Spectral weight decay: shrink the top of the spectrum of a matrix, and nothing else (post kexue.fm/archives/10648).

    W <- W - eta lambda W v v'        v = v_1, the top right singular vector of W

It is decoupled decay by the gradient of ||W||_2^2 / 2, which is sigma_1 u_1 v_1' = W v_1 v_1'. Ordinary decay is that
of ||W||_F^2 / 2 and shrinks every singular value. With rank r, V has r orthonormal columns and W V V' is taken.

v is state: 15 power iterations from a Gaussian start when it is made, one per step from there on, which follows a
slowly moving W closely where sigma_1 stands apart: k iterations leave (sigma_2 / sigma_1)^2k of v_2 in v, so that 15
find v_1 if sigma_2 is below some 0.85 sigma_1. Else, as in Gaussian initial weights, v is a mixture of the top
singular vectors, and the same eta lambda sigma_1 is taken off several large singular values together. A v that lags
behind does no harm: I - eta lambda V V' has norm at most 1 for 0 <= eta lambda <= 2 and *any* orthonormal V, so that
no singular value grows.

For wide W the vectors of the shorter side are kept instead, and (I - eta lambda U U') W is taken: the same thing
where v has converged, with the same guarantee, and the smaller state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.linalg.spectral import gaussian_start, wide_and_scaled

__all__ = ["DECAYS", "follow_top_space", "spectral_decay_", "start_top_space", "top_space_shape"]

DECAYS = ("frobenius", "spectral")
"""Names of weight decays: of all singular values, or of the largest."""

_FIRST_ITERATIONS = 15
_SEED = 0


def top_space_shape(count: int, n: int, m: int, rank: int) -> tuple[int, int, int]:
    """Shape of the state of ``count`` n x m matrices: (count, shorter side, rank or all there is)."""
    short = min(n, m)
    return count, short, min(rank, short)


def start_top_space(W: Tensor, rank: int) -> Tensor:
    """Orthonormal vectors near the top singular space, from a seeded Gaussian start.

    Args:
        W: (count, n, m).
        rank: How many singular values to decay, 1 or more.

    Returns:
        (count, min(n, m), min(rank, n, m)): of the right side for n >= m, else of the left.
    """
    count, n, m = W.shape
    _, short, r = top_space_shape(count, n, m, rank)
    X, _ = wide_and_scaled(W)
    V = gaussian_start(short, r, _SEED, X).repeat(count, 1, 1)
    for _ in range(_FIRST_ITERATIONS):
        V = _iterate(X, V)
    return V


def follow_top_space(W: Tensor, V: Tensor) -> Tensor:
    """One more iteration of V, (count, min(n, m), r), towards the top singular space of W, (count, n, m)."""
    return _iterate(wide_and_scaled(W)[0], V)


def spectral_decay_(W: Tensor, V: Tensor, amount: float | Tensor) -> Tensor:
    """W <- W - amount W V V' (or U U' W for wide W), in place.

    Args:
        W: (count, n, m).
        V: (count, min(n, m), r), orthonormal columns, as from :func:`start_top_space`.
        amount: eta lambda, in [0, 2] if no singular value may grow.

    Returns:
        W.
    """
    V = V.to(W.dtype)
    if W.shape[-2] >= W.shape[-1]:
        return W.sub_((W @ V) @ (V.mT * amount))
    return W.sub_((V * amount) @ (V.mT @ W))


def _iterate(X: Tensor, V: Tensor) -> Tensor:
    """V <- orthonormal basis of X'X V (of X X' V for wide X); V itself where that is zero or not finite."""
    Z = X.mT @ (X @ V) if X.shape[-2] >= X.shape[-1] else X @ (X.mT @ V)
    Z, _ = wide_and_scaled(Z)  # so that the length is right, and V exactly orthonormal, however small Z is
    size = torch.linalg.vector_norm(Z, dim=(-2, -1), keepdim=True)
    usable = (size > 0) & size.isfinite()
    if V.shape[-1] == 1:
        return torch.where(usable, Z / size, V)
    Q = torch.linalg.qr(torch.where(usable, Z, V)).Q
    return torch.where(usable, Q, V)
