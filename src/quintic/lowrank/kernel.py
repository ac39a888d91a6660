"""Nystrom approximation of a positive semi-definite matrix from a few of its columns (posts 8180 and 10662).

    A ~ C W^+ C' = F F',   C = A[:, J],   W = A[J, J]

It is the cross core of CUR with the same rows as columns, never exceeds A (A - F F' stays semi-definite) and touches
only k columns once J is chosen. F = C Q Lambda^-1/2 from the eigenvalues of W that are above its rounding error.

F itself has no derivative where eigenvalues of W coincide, since its columns may turn among themselves; F F' has one
all the same, and gets it: those turns are left out. At a singular W it is the one at constant rank.

Where A is a kernel of points, k(x, x_J) Q Lambda^-1/2 are features of any other point x (Williams and Seeger, NIPS
2000): inner products of them approximate the kernel, and those of the given points are F.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.lowrank.kernel_matrix import KernelMatrix
from quintic.lowrank.result import Approximation, check_rank, labels_at, positions, search_rank
from quintic.lowrank.selection import Method, choose, method_name
from quintic.lowrank.source import Source, as_source

__all__ = ["Nystrom", "nystrom"]


@dataclass(frozen=True, eq=False, repr=False)
class Nystrom(Approximation):
    """A ~ F F'."""

    indices: Any
    """(..., k): the chosen columns, which are also the chosen rows."""
    normalization: Any
    """(..., k, k): Q Lambda^-1/2, with F = A[:, J] normalization."""
    names: list[Any] | None = None
    """Their labels, if labels were given."""

    @property
    def F(self) -> Any:
        """(..., n, k)."""
        return self.left

    @property
    def cols(self) -> Any:
        """The chosen columns."""
        return self.indices

    @property
    def rows(self) -> Any:
        """The chosen rows."""
        return self.indices

    def features(self, points: Any) -> Any:
        """Features (l, k) of new points (l, ...), of a :class:`quintic.lowrank.KernelMatrix`.

        Their inner products approximate the kernel; those of the decomposed points are the rows of F.

        Raises:
            ConfigError: A matrix was decomposed, whose kernel is not known.
            DataError: The points are not like those of the matrix, or the kernel has values that are not finite.

        Example:
            >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)
            >>> found = nystrom(KernelMatrix(lambda x, y: torch.exp(-(x[:, None] - y).square()), x), rank=8)
            >>> new = found.features(torch.tensor([0.123, 0.7], dtype=torch.float64))
            >>> new.shape, bool((new[0] @ new[1] - torch.exp(torch.tensor(-(0.577**2)))).abs() < 1e-6)
            (torch.Size([2, 8]), True)
        """
        if not isinstance(self.source, KernelMatrix):
            raise ConfigError(
                "features of new points need the kernel; decompose quintic.lowrank.KernelMatrix(kernel, points), "
                "or take kernel(new, points[indices]) @ normalization"
            )
        at, normalization = self.source.into(self.indices), self.source.into(self.normalization)
        return self.source.out(self.source.to_points(points, at) @ normalization)


def nystrom(
    A: Any,
    rank: int | None = None,
    *,
    tol: float | None = None,
    method: Method = "quality",
    indices: Any = None,
    labels: Sequence[Any] | None = None,
    seed: int = 0,
) -> Nystrom:
    """Approximate a kernel or covariance matrix by k of its columns.

    Exactly one of ``rank``, ``tol`` and ``indices`` is given.

    Args:
        A: (..., n, n), Hermitian and positive semi-definite, whatever :func:`quintic.lowrank.interpolative` takes; or
            a :class:`quintic.lowrank.KernelMatrix`, of which never more than blocks are held.
        rank: k, 1 to n.
        tol: Largest relative error ||A - F F'||_F / ||A||_F.
        method: Selection rule, see :data:`quintic.lowrank.selection.RULES`.
        indices: Columns to use, (k,) or (..., k).
        labels: n names.
        seed: Of whatever is drawn.

    Raises:
        ConfigError: An argument is unusable, or the tolerance out of reach.
        DataError: A is not square, or its chosen part is not Hermitian or not semi-definite.

    Example:
        >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)
        >>> kernel = torch.exp(-(x[:, None] - x).square())
        >>> nystrom(kernel, rank=6).error() < 1e-6
        True
    """
    if sum(given is not None for given in (rank, tol, indices)) != 1:
        raise ConfigError("expected exactly one of rank, tol and indices")
    source = as_source(A)
    if source.shape[-1] != source.shape[-2]:
        raise DataError(f"expected a square matrix, found shape {source.shape}")

    def attempt(k: int) -> Nystrom:
        return _from_landmarks(source, choose(source, k, method, seed), method_name(method), labels)

    if indices is not None:
        return _from_landmarks(source, positions(indices, source.shape[-1], source, "indices"), "fixed", labels)
    if tol is not None:
        return search_rank(attempt, source, tol)
    assert rank is not None
    return attempt(check_rank(rank, source))


def _from_landmarks(source: Source, at: Tensor, method: str, labels: Sequence[Any] | None) -> Nystrom:
    C = source.columns(at) / source.scale
    W = C.gather(-2, at.unsqueeze(-1).expand(*at.shape, at.shape[-1]))
    limit = at.shape[-1] * torch.finfo(W.dtype).eps
    size = torch.linalg.vector_norm(W.detach(), dim=(-2, -1))
    skew = torch.linalg.vector_norm((W - W.mH).detach(), dim=(-2, -1))
    if (skew > 100 * limit * size).any():
        raise DataError(
            "expected a Hermitian matrix: A[J, J] differs from its conjugate transpose; symmetrise it first"
        )
    W = (W + W.mH) / 2
    value, Q = torch.linalg.eigh(W.detach())
    if (value[..., 0] < -100 * limit * size).any():
        raise DataError(
            f"expected a positive semi-definite matrix: A[J, J] has the eigenvalue {float(value[..., 0].min()):.3g} "
            "(at the scale of the matrix); cur takes any matrix"
        )
    normalization: Tensor = _InverseRoot.apply(W, value, Q)  # pyright: ignore[reportAssignmentType]
    root = source.scale.sqrt() if isinstance(source.scale, Tensor) else source.scale**0.5
    F = C @ normalization * root
    indices = source.out(at)
    names = labels_at(labels, indices, source.shape[-1], "labels")
    return Nystrom(source.out(F), source.out(F.mH), method, source, indices, source.out(normalization / root), names)


class _InverseRoot(torch.autograd.Function):
    """N = Q Lambda^-1/2 of the eigenvalues above rounding errors, zero in other columns.

    With M = N' dW N and P the projection on the eigenvectors left out

        dN = N (-M / 2 + turn) + P dW N Lambda^-1,    turn_ij = M_ij (lambda_i + lambda_j) / (2 (lambda_j - lambda_i))

    The turn is antihermitian, and does not change N N'.
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, value: Tensor, Q: Tensor) -> Tensor:
        # A cut that grows with k would make the error grow, once k is past the numerical rank.
        kept = value > torch.finfo(value.dtype).eps * value[..., -1:]
        N = Q * torch.where(kept, value, 1.0).rsqrt().mul(kept).unsqueeze(-2)
        ctx.save_for_backward(N)
        return N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In terms of N alone, so that it can be differentiated again.
        (N,), (G,) = ctx.saved_tensors, grads
        size = N.abs().square().sum(-2)
        value = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
        column, row = value.unsqueeze(-1), value.unsqueeze(-2)
        gap = row - column
        apart = gap.detach().abs() > torch.finfo(value.dtype).eps ** 0.5 * torch.maximum(row, column).detach()
        turn = torch.where(apart, (row + column) / torch.where(apart, gap, 1.0), 0.0)
        inner = N.mH @ G
        to_W = N @ (inner * (turn - 1) / 2) @ N.mH
        basis = N * value.sqrt().unsqueeze(-2)
        to_W = to_W + (G - basis @ (basis.mH @ G)) @ (N * size.unsqueeze(-2)).mH
        return (to_W + to_W.mH) / 2, None, None
