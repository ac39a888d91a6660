"""Interpolative decomposition: a matrix from a few of its own columns (post kexue.fm/archives/10501).

    A ~ C Z,   C = A[:, J],   Z[:, J] = I

For given J the best Z, in the Frobenius and in the spectral norm, is C^+ A, and it interpolates by itself where C has
full rank. With C = Q T it is T^-1 Q' A, which costs one more product with A than the choice of J; how it is computed
where columns depend on each other is said in :mod:`quintic.lowrank.least_squares`. A row decomposition A ~ X R with
R = A[I, :] is that of the conjugate transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.lowrank.least_squares import apply_inverse, column_sizes, independent, pseudo_solve
from quintic.lowrank.result import Approximation, check_rank, labels_at, positions, search_rank
from quintic.lowrank.selection import Method, choose, method_name
from quintic.lowrank.source import Dense, Source, as_source

__all__ = ["Interpolation", "interpolative"]

SIDES = ("columns", "rows")


@dataclass(frozen=True, eq=False, repr=False)
class Interpolation(Approximation):
    """A ~ C Z from columns, or A ~ X R from rows."""

    side: str
    """``columns`` or ``rows``."""
    indices: Any
    """(..., k): the chosen columns or rows, in the order of choice."""
    names: list[Any] | None = None
    """Their labels, if labels were given."""

    @property
    def cols(self) -> Any:
        """The chosen columns, None for a row decomposition."""
        return self.indices if self.side == "columns" else None

    @property
    def rows(self) -> Any:
        """The chosen rows, None for a column decomposition."""
        return self.indices if self.side == "rows" else None

    @property
    def C(self) -> Any:
        """(..., m, k): the chosen columns themselves, None for a row decomposition."""
        return self.left if self.side == "columns" else None

    @property
    def R(self) -> Any:
        """(..., k, n): the chosen rows themselves, None for a column decomposition."""
        return self.right if self.side == "rows" else None

    @property
    def Z(self) -> Any:
        """The coefficients: (..., k, n) with A ~ C Z, or (..., m, k) with A ~ Z R. The chosen part is the identity."""
        return self.right if self.side == "columns" else self.left


def interpolative(
    A: Any,
    rank: int | None = None,
    *,
    tol: float | None = None,
    side: str = "columns",
    method: Method = "quality",
    indices: Any = None,
    row_labels: Sequence[Any] | None = None,
    column_labels: Sequence[Any] | None = None,
    seed: int = 0,
) -> Interpolation:
    """Write a matrix as combinations of k of its columns or rows.

    Exactly one of ``rank``, ``tol`` and ``indices`` is given. For fixed indices (and for chosen ones, which count as
    fixed) the factors are differentiable functions of a tensor A whose chosen columns are independent. Where they are
    not, to working precision, the gradient is the one at constant rank, and can be taken once.

    Args:
        A: (..., m, n): tensor, numpy array, scipy or torch sparse matrix, operator or
            :class:`quintic.lowrank.RowBlocks`. For rows that can be read only once see
            :func:`quintic.lowrank.read_once`.
        rank: k, 1 to min(m, n).
        tol: Largest relative error ||A - C Z||_F / ||A||_F; the smallest k found by bisection that keeps it.
        side: ``columns`` or ``rows``.
        method: Selection rule, see :data:`quintic.lowrank.selection.RULES`.
        indices: Columns or rows to use, (k,) or (..., k).
        row_labels: m names.
        column_labels: n names.
        seed: Of whatever is drawn.

    Raises:
        ConfigError: An argument is unusable, or the tolerance out of reach.
        DataError: A is no matrix, is empty, or has an element that is not finite.

    Example:
        >>> A = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
        >>> found = interpolative(A, rank=1)
        >>> torch.allclose(A[:, found.cols] @ found.Z, A)
        True
    """
    if sum(given is not None for given in (rank, tol, indices)) != 1:
        raise ConfigError("expected exactly one of rank, tol and indices")
    if side not in SIDES:
        raise ConfigError(f"unknown side {side!r}{suggest(str(side), SIDES)}")
    whole = as_source(A)
    source = whole if side == "columns" else whole.H
    labels = column_labels if side == "columns" else row_labels

    def attempt(k: int) -> Interpolation:
        return _from_columns(whole, source, side, choose(source, k, method, seed), method_name(method), labels)

    if indices is not None:
        at = positions(indices, source.shape[-1], source, "indices")
        check_rank(at.shape[-1], whole, "the number of indices")
        return _from_columns(whole, source, side, at, "fixed", labels)
    if tol is not None:
        return search_rank(attempt, whole, tol)
    assert rank is not None
    return attempt(check_rank(rank, whole))


def _from_columns(
    whole: Source, source: Source, side: str, at: Tensor, method: str, labels: Sequence[Any] | None
) -> Interpolation:
    C = source.columns(at)
    Z = _coefficients(source, C / source.scale)
    # Exact in exact arithmetic; now also in floating point, and for columns that depend on each other.
    unit = (at.unsqueeze(-1) == at.unsqueeze(-2)).to(Z.dtype)
    unit = unit / unit.sum(-1, keepdim=True)  # a column that was named twice is half of each
    Z = Z.scatter(-1, at.unsqueeze(-2).expand(*Z.shape[:-1], -1), unit)
    left, right = (C, Z) if side == "columns" else (Z.mH, C.mH)
    kept = whole.out(at)
    names = labels_at(labels, kept, source.shape[-1], f"{side.removesuffix('s')} labels")
    return Interpolation(whole.out(left), whole.out(right), method, whole, side, kept, names)


def _coefficients(source: Source, C: Tensor) -> Tensor:
    """C^+ A."""
    size = column_sizes(C)
    C = C / size
    Q, T = torch.linalg.qr(C)
    regular = independent(T)
    if regular.all() or not (isinstance(source, Dense) and C.requires_grad):
        return apply_inverse(T, source.rmatmat(Q).mH) / size.mT
    # QR has no derivative where columns depend on each other, and what comes back through it is not a number even
    # where nothing went in: such matrices take another way, and none of a batch takes both.
    Z = pseudo_solve(C, source.tensor)
    if regular.any():
        Q, T = torch.linalg.qr(torch.where(regular, C, torch.eye(*C.shape[-2:], dtype=C.dtype, device=C.device)))
        Z = torch.where(regular, torch.linalg.solve_triangular(T, Q.mH @ source.tensor, upper=True), Z)
    return Z / size.mT
