"""CUR decomposition: a matrix from a few of its own columns and rows (post kexue.fm/archives/10662).

    A ~ C U R,   C = A[:, S1],   R = A[S2, :]

U by itself is badly conditioned: formed as C^+ A R^+ it loses all accuracy on a Hilbert matrix. The result therefore
is a pair of factors, computed without U:

* projection: U = C^+ A R^+, the best in the Frobenius norm. With C = Q_C T_C and R' = Q_R T_R
  it is (Q_C (Q_C' A Q_R)) Q_R'. Rows and columns are chosen independently of each other, and may differ in number.
* cross: U = A[S2, S1]^+, which needs no pass over A beyond the choice and reproduces the chosen rows and columns.
  It is (Q_C Q_C[S2, :]^+) R, with rows chosen so that Q_C[S2, :] is well conditioned even where C is not. More rows
  than columns (``rank=(30, 40)``) bring it nearer to the projection; then only the columns are reproduced exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.linalg.sketch import OVERSAMPLING, gaussian
from quintic.lowrank.least_squares import apply_inverse
from quintic.lowrank.pivots import cross_pivots, lu_pivots, residual_pivots
from quintic.lowrank.result import Approximation, check_rank, labels_at, positions, search_rank
from quintic.lowrank.selection import Method, choose, method_name
from quintic.lowrank.source import Dense, Source, as_source

__all__ = ["CORES", "Skeleton", "cur"]

CORES = ("projection", "cross")
"""Names accepted by :func:`cur`."""


@dataclass(frozen=True, eq=False, repr=False)
class Skeleton(Approximation):
    """A ~ C U R, kept as the pair left right; C, U and R are there to look at."""

    cols: Any
    """(..., c): the chosen columns, in the order of choice."""
    rows: Any
    """(..., r): the chosen rows."""
    C: Any
    """(..., m, c): the columns themselves."""
    R: Any
    """(..., r, n): the rows themselves."""
    core: str
    """``projection`` or ``cross``."""
    column_names: list[Any] | None = None
    """Labels of the columns, if labels were given."""
    row_names: list[Any] | None = None
    """Labels of the rows, if labels were given."""

    @property
    def rank(self) -> int:
        """min(c, r)."""
        return min(self.C.shape[-1], self.R.shape[-2])

    @property
    def U(self) -> Any:
        """(..., c, r) with C U R near the approximation, cut at the rounding error of C and R.

        For reading only: on ill-conditioned columns C U R is far less accurate than ``left @ right``.
        """
        C, R, left, right = (self.source.into(part) for part in (self.C, self.R, self.left, self.right))
        limit = max(C.shape[-2:] + R.shape[-2:]) * torch.finfo(C.dtype).eps
        return self.source.out(torch.linalg.pinv(C, rtol=limit) @ left @ (right @ torch.linalg.pinv(R, rtol=limit)))

    def _rank_words(self) -> str:
        c, r = self.C.shape[-1], self.R.shape[-2]
        return f"rank {c}" if c == r else f"{c} columns and {r} rows"


def cur(
    A: Any,
    rank: int | tuple[int, int] | None = None,
    *,
    tol: float | None = None,
    method: Method = "quality",
    core: str = "projection",
    columns: Any = None,
    rows: Any = None,
    row_labels: Sequence[Any] | None = None,
    column_labels: Sequence[Any] | None = None,
    seed: int = 0,
) -> Skeleton:
    """Write a matrix by a few of its columns and rows.

    Exactly one of ``rank``, ``tol`` and the pair ``columns``, ``rows`` is given. For fixed columns and rows (and for
    chosen ones, which count as fixed) the factors are differentiable functions of a tensor A.

    Args:
        A: (..., m, n), whatever :func:`quintic.lowrank.interpolative` takes.
        rank: Columns and rows, or (columns, rows), each 1 to min(m, n).
        tol: Largest relative error ||A - C U R||_F / ||A||_F, with the projection core; equal numbers of both.
        method: Selection rule, see :data:`quintic.lowrank.selection.RULES`.
        core: ``projection``: the best U. ``cross``: the pseudo-inverse of the intersection.
        columns: Columns to use, (c,) or (..., c).
        rows: Rows to use, (r,) or (..., r).
        row_labels: m names.
        column_labels: n names.
        seed: Of whatever is drawn.

    Raises:
        ConfigError: An argument is unusable, or the tolerance out of reach.
        DataError: A is no matrix, is empty, or has an element that is not finite.

    Example:
        >>> A = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
        >>> found = cur(A, rank=1, column_labels=["a", "b", "c"])
        >>> found.column_names, torch.allclose(found.C @ found.U @ found.R, A)
        (['c'], True)
    """
    if sum((rank is not None, tol is not None, columns is not None or rows is not None)) != 1:
        raise ConfigError("expected exactly one of rank, tol and the pair columns, rows")
    if core not in CORES:
        raise ConfigError(f"unknown core {core!r}{suggest(str(core), CORES)}")
    source = as_source(A)
    project = _projection if core == "projection" else _cross
    labels = (row_labels, column_labels)

    def attempt(c: int, r: int) -> Skeleton:
        S1, S2 = (
            _independent(source, c, r, method, seed) if core == "projection" else _joint(source, c, r, method, seed)
        )
        return _skeleton(source, project, core, S1, S2, method_name(method), labels)

    if tol is not None:
        if core != "projection":
            raise ConfigError("tol is for core='projection'; a cross core has no bound to check it against")
        return search_rank(lambda k: attempt(k, k), source, tol)
    if rank is None:
        if columns is None or rows is None:
            raise ConfigError("fixed columns and rows come together; expected both")
        S1 = positions(columns, source.shape[-1], source, "columns")
        S2 = positions(rows, source.shape[-2], source, "rows")
        return _skeleton(source, project, core, S1, S2, "fixed", labels)
    if isinstance(rank, tuple | list) and len(rank) == 2:
        return attempt(check_rank(rank[0], source, "columns"), check_rank(rank[1], source, "rows"))
    k = check_rank(rank, source)
    return attempt(k, k)


def _skeleton(source: Source, project: Any, core: str, S1: Tensor, S2: Tensor, method: str, labels: Any) -> Skeleton:
    C, R = source.columns(S1), source.rows(S2)
    left, right = project(source, C, R, S1, S2)
    cols, rows = source.out(S1), source.out(S2)
    return Skeleton(
        left=source.out(left),
        right=source.out(right),
        method=method,
        source=source,
        cols=cols,
        rows=rows,
        C=source.out(C),
        R=source.out(R),
        core=core,
        column_names=labels_at(labels[1], cols, source.shape[-1], "column labels"),
        row_names=labels_at(labels[0], rows, source.shape[-2], "row labels"),
    )


def _projection(source: Source, C: Tensor, R: Tensor, S1: Tensor, S2: Tensor) -> tuple[Tensor, Tensor]:
    Q_C = torch.linalg.qr(C / source.scale).Q
    Q_R = torch.linalg.qr(R.mH / source.scale).Q
    return Q_C @ (Q_C.mH @ source.matmat(Q_R)) * source.scale, Q_R.mH


def _cross(source: Source, C: Tensor, R: Tensor, S1: Tensor, S2: Tensor) -> tuple[Tensor, Tensor]:
    if R.shape[-2] < C.shape[-1]:
        left, right = _cross(source.H, R.mH, C.mH, S2, S1)
        return right.mH, left.mH
    Q = torch.linalg.qr(C / source.scale).Q
    return _over_rows(Q, S2), R


def _over_rows(Q: Tensor, S2: Tensor) -> Tensor:
    """X = Q Q[S2, :]^+, which gives a matrix with columns in the span of Q from its rows S2."""
    P, T = torch.linalg.qr(Q.gather(-2, S2.unsqueeze(-1).expand(*S2.shape, Q.shape[-1])))
    return apply_inverse(T, Q.mH, adjoint=True).mH @ P.mH


def _independent(source: Source, c: int, r: int, method: Method, seed: int) -> tuple[Tensor, Tensor]:
    return choose(source, c, method, seed), choose(source.H, r, method, seed)


@torch.no_grad()
def _joint(source: Source, c: int, r: int, method: Method, seed: int) -> tuple[Tensor, Tensor]:
    """Columns, and rows on which the space of the columns is well seen."""
    if r < c:
        S2, S1 = _joint(source.H, r, c, method, seed)
        return S1, S2
    if method == "greedy-det" and isinstance(source, Dense):
        S2, S1 = cross_pivots(source.tensor, c)
    else:
        S1, S2 = choose(source, c, method, seed), None
    Q = torch.linalg.qr(source.columns(S1) / source.scale).Q
    if method == "quality":
        products = source.matmat(gaussian(source.shape[-1], 2 * c + OVERSAMPLING, seed, source.dtype, source.device))
        products = products * products.shape[-1] ** -0.5
        left = products - Q @ (Q.mH @ products)
        S2 = residual_pivots(Q.mH, left.mH, torch.linalg.vector_norm(products, dim=(-2, -1)))
    elif S2 is None:
        S2 = lu_pivots(Q)
    for _ in range(r - c):
        # The row that the others predict worst: the one with the largest coefficients.
        size = torch.linalg.vector_norm(_over_rows(Q, S2), dim=-1).scatter(-1, S2, -1.0)
        S2 = torch.cat([S2, size.argmax(-1, keepdim=True)], -1)
    return S1, S2
