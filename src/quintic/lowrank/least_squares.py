"""The least-squares solution C^+ B where columns of C may depend on each other (post kexue.fm/archives/10501).

    X = T^-1 Q' B        with C = Q T, where the columns are independent;
    X = V S^+ U' B       with C = U S V', singular values of the size of rounding errors left out, where they are not

Columns past the numerical rank of a matrix consist of rounding errors, and the triangle T of them has an inverse that
is exponentially larger than its diagonal tells. S is cut at k eps S_1, below which all may be noise; at eps S_1, with a
step of refinement, where the residual B - C X shows that it was not; and not at all where that is better still. By
noise alone coefficients would become larger by 1 / eps.

The derivative of the first is that of its formula; of the second it is the one at constant rank (Golub and Pereyra,
SIAM J. Numer. Anal. 10, 1973), with P = C^+:

    dX = P dB - P dC X + P P' dC' (B - C X) + (I - P C) dC' P' X
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["apply_inverse", "column_sizes", "independent", "pseudo_solve"]

_PAYS = 0.7
"""Share of the residual that another solution has to leave less than."""


def apply_inverse(T: Tensor, B: Tensor, *, adjoint: bool = False) -> Tensor:
    """T^-1 B, or T'^-1 B, for an upper triangular T; T^+ B, or T'^+ B, where T may be singular to rounding."""
    regular = independent(T)
    safe = torch.where(regular, T, torch.eye(T.shape[-1], dtype=T.dtype, device=T.device))
    solved = torch.linalg.solve_triangular(safe.mH if adjoint else safe, B, upper=not adjoint)
    if regular.all():
        return solved
    return torch.where(regular, solved, pseudo_solve(T.mH if adjoint else T, B))


def independent(T: Tensor) -> Tensor:
    """(..., 1, 1): whether an upper triangle has an inverse that rounding errors leave alone, by a wide margin."""
    size = T.detach().diagonal(dim1=-2, dim2=-1).abs()
    return (size.amin(-1) > torch.finfo(T.dtype).eps ** 0.5 * size.amax(-1))[..., None, None]


def column_sizes(C: Tensor) -> Tensor:
    """(..., 1, k): powers of two near the lengths of columns, 1 for those of zeros.

    Independence has nothing to do with lengths, but a triangle of short and long columns looks singular. To divide by
    powers of two changes no digit.
    """
    C = C.detach()
    tiny = torch.finfo(C.dtype).tiny
    peak = C.abs().amax(-2, keepdim=True)  # whose squares could leave the range
    length = peak * torch.linalg.vector_norm(C / peak.clamp_min(tiny), dim=-2, keepdim=True)
    power = torch.ldexp(torch.ones_like(length), torch.frexp(length).exponent - 1)
    return torch.where(length > 0, power, 1.0).clamp_min(tiny)


def pseudo_solve(C: Tensor, B: Tensor) -> Tensor:
    """C^+ B for C (..., m, k), m >= k, by a singular value decomposition; differentiable once, and finite always."""
    return _LeastSquares.apply(C, B)  # pyright: ignore[reportReturnType]


class _LeastSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, B: Tensor) -> Tensor:
        Q, T = torch.linalg.qr(C)
        Y = Q.mH @ B
        U, S, Vh = torch.linalg.svd(T)
        small = torch.finfo(T.dtype).eps * S[..., :1]
        inverse = _inverse(S, T.shape[-1] * small)
        X = _solve(U, inverse, Vh, Y)
        # What may be noise stays in only where that pays, and where coefficients tell that it is none.
        most = torch.finfo(T.dtype).eps ** -0.5
        more = _inverse(S, small)
        nearer = _solve(U, more, Vh, Y)
        nearer = nearer + _solve(U, more, Vh, Y - T @ nearer)
        # Columns without any order may be better off with the triangle, whose errors are those of each by itself.
        for tried in (nearer, torch.linalg.solve_triangular(T, Y, upper=True)):
            better = _size(Y - T @ tried) < _PAYS * _size(Y - T @ X)
            better = better & (_size(tried) < most * _size(X))
            X, inverse = torch.where(better, tried, X), torch.where(better, more, inverse)
        ctx.save_for_backward(B, X, Q, U, Vh, inverse)
        return X

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        B, X, Q, U, Vh, inverse = ctx.saved_tensors
        (G,) = grads
        dropped = inverse == 0
        W = inverse * (Vh @ G)
        to_B = Q @ (U @ W)  # P' G
        if not ctx.needs_input_grad[0]:
            return None, to_B
        Y = Q.mH @ B
        # B - C X in directions that do not take part; of a square C with an inverse there are none.
        off = Q @ (U @ (dropped * (U.mH @ Y)))
        if Q.shape[-2] > Q.shape[-1]:
            off = off + (B - Q @ Y)
        idle = Vh.mH @ (dropped * (Vh @ G))  # (I - P C) G
        to_C = off @ (Vh.mH @ (inverse * W)).mH - to_B @ X.mH + Q @ (U @ (inverse * (Vh @ X))) @ idle.mH
        return to_C, to_B


def _inverse(S: Tensor, cut: Tensor) -> Tensor:
    """(..., k, 1): 1 / S, or 0 where that is not above the cut."""
    kept = cut < S
    return torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0).unsqueeze(-1)


def _solve(U: Tensor, inverse: Tensor, Vh: Tensor, Y: Tensor) -> Tensor:
    # From right to left: the pseudo-inverse as a matrix of its own would have rounding errors of the size of B.
    return Vh.mH @ (inverse * (U.mH @ Y))


def _size(M: Tensor) -> Tensor:
    return torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True)
