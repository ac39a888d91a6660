"""How far two thin factors are from a matrix with fast products, without forming the product of the factors.

    ||A - L R||^2 = ||A||^2 - ||B||^2 + ||B - T||^2        norms of Frobenius
    L = Q_L T_L,   R' = Q_R T_R,   T = T_L T_R',   B = Q_L' A Q_R

since Q_L B Q_R' is the projection of A on the spaces that hold L R. It takes one product with A and O((m + n) k^2)
operations instead of O(m n k), all in double precision.

||A||^2 - ||B||^2 cancels where little is left. Its error is that of inner products of lengths m and n, by the
probabilistic bounds for rounding errors (Higham and Mary, SIAM J. Sci. Comput. 41, 2019) about
d = 4 sqrt(m + n) eps ||A||^2; measured were up to half of that. The residual E is then known to the share
d / (2 ||E||^2) of itself, and nothing is said where this is above 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.linalg.sketch import safe_scale

__all__ = ["residual_of_thin"]

_SURE_TO = 1e-6
"""Relative error of a residual that is given: ||E|| above about 2e-4 ||A|| for m + n = 10^4."""


def residual_of_thin(A: Tensor, whole: Tensor, left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor | None:
    """||A - left right / scale||_F, or None where less than six digits of it would be right.

    Args:
        A: (m, n) sparse, of double precision, whose squares are within its range.
        whole: ||A||_F.
        left: (m, k).
        right: (k, n).
        scale: What the product of the factors is to be divided by.
    """
    Q_L, T_L, size_L = _factored(left.to(A.dtype))
    Q_R, T_R, size_R = _factored(right.mH.to(A.dtype))
    # One factor may have the size of the matrix, and the other none; together they are of the size of A.
    T = T_L @ T_R.mH * (size_L / scale * size_R)
    B = Q_L.mH @ (A @ Q_R)
    kept = torch.linalg.vector_norm(B)
    square = (whole - kept) * (whole + kept) + torch.linalg.vector_norm(B - T).square()
    uncertain = 4 * sum(A.shape) ** 0.5 * torch.finfo(A.dtype).eps * whole.square()
    return square.sqrt() if uncertain < 2 * _SURE_TO * square else None


def _factored(tall: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    size = safe_scale(tall)
    return *torch.linalg.qr(tall / size), size
