"""Columns chosen one after the other, each for what the ones before it leave (posts kexue.fm/archives/10501, 10662).

Every rule here and in :mod:`quintic.lowrank.scores` is a plain function of one contract:

    rule(A, k, seed=0) -> positions (..., k) of k different columns of A (..., m, n), for 1 <= k <= min(m, n)

The same seed gives the same columns, and the scale of A does not matter. A matrix gets the same ones in any batch up to
its numerical rank; past it rounding errors decide.
Symbols: E is what the columns chosen so far leave of A, V the leading right singular vectors.

=================  ======================================================  =======================================
rule               next column                                             cost
=================  ======================================================  =======================================
residual_aware     argmin |E_j|^2 / |V_j|^2, E = A - A V V'                7 products with thin blocks, O(n k^2)
sketched_lu        pivots of an LU of (Omega A A' A)'                      3 products with thin blocks, O(n k^2)
pivoted_qr         the longest column of E                                 O(m n k)
deim               the largest element of the interpolation error of V     4 products with thin blocks, O(n k^2)
greedy_error       the column that lowers ||E||_F most                     O(n k^3), on a sketch
greedy_det         column of the largest element of E, and its row         O(m n k)
=================  ======================================================  =======================================

residual_aware is Osinsky's rule ("Close to optimal column approximations", arXiv 2308.09068), adaptive randomised
pivoting without the randomness: ||A - C C^+ A||_F^2 <= (k + 1) ||A - A V V'||_F^2. sketched_lu is Dong and
Martinsson's ("Simpler is better", 2021).
"""

from __future__ import annotations

from math import prod
from operator import index
from typing import overload

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.linalg.sketch import OVERSAMPLING, Operator, dominant, safe_scale, sketch_rows

__all__ = [
    "basis_and_residual",
    "cross_pivots",
    "deim",
    "greedy_det",
    "greedy_error",
    "lu_pivots",
    "pivoted_qr",
    "prepared",
    "residual_aware",
    "residual_pivots",
    "sketched_lu",
]

_FRESH = 0x9E3779B97F4A  # a second stream of the same seed


def residual_aware(A: Tensor | Operator, k: int, *, seed: int = 0) -> Tensor:
    """Columns that lie well in the dominant subspace and are rich in it: the best quality for its price.

    Where the shorter side of A is above 4 k + 200, V comes from a randomised SVD and E from a sketch of 2 k + 100 rows.
    """
    A = prepared(A, k)
    return residual_pivots(*basis_and_residual(A, k, seed))


def sketched_lu(A: Tensor | Operator, k: int, *, seed: int = 0) -> Tensor:
    """The fastest rule of good quality: three products with a thin matrix, and an LU with row exchanges.

    The power step among the products is worth 5 % of the error. A sketch of more than k rows would be worth nothing:
    the first k pivots do not see them.
    """
    return lu_pivots(sketch_rows(prepared(A, k), k, seed=seed, power=1).mH)


def pivoted_qr(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """QR with column pivoting, the choice of LAPACK and scipy; deterministic."""
    A = prepared(A, k)
    E = _columns(_square(A))
    taken = torch.zeros(E.shape[:-1], dtype=torch.bool, device=E.device)
    chosen = []
    for _ in range(k):
        j = torch.linalg.vector_norm(E, dim=-1).masked_fill(taken, -1.0).argmax(-1)
        chosen.append(j)
        taken.scatter_(-1, j.unsqueeze(-1), True)
        _deflate(E, j)
    return torch.stack(chosen, -1).reshape(*A.shape[:-2], k)


def deim(A: Tensor | Operator, k: int, *, seed: int = 0) -> Tensor:
    """Discrete empirical interpolation: step t takes the largest element of V_t - V_<t V_<t[S]^-1 V_t[S].

    These are exactly the row exchanges of an LU of V, which is how they are computed. LAPACK takes the size of a
    complex element to be |re| + |im|.
    """
    return lu_pivots(dominant(prepared(A, k), k, seed=seed).Vh.mH)


def greedy_error(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Each column is the one that lowers the total error most: ||E' E_j||^2 / ||E_j||^2 is the largest.

    E is updated itself by orthogonal projections; the usual recursion for the gains squares the condition number.
    With more than 4 k + 20 rows E is seen through a sketch of half as many.
    """
    A = prepared(A, k)
    size = 2 * k + OVERSAMPLING
    small = _square(A)
    E = _columns(small if small.shape[-2] <= 2 * size else sketch_rows(small, size, seed=seed))
    # Below this a column consists of the rounding errors of its projections.
    floor = (E.shape[-1] * torch.finfo(E.dtype).eps * torch.linalg.vector_norm(E, dim=-1)).square()
    taken = torch.zeros(E.shape[:-1], dtype=torch.bool, device=E.device)
    chosen = []
    for _ in range(k):
        length = _squares(E)
        gain = (E.conj() * (E @ (E.mH @ E))).sum(-1).real / length
        gain = torch.where(length > floor, gain, 0.0).masked_fill(taken, -1.0)
        j = gain.argmax(-1)
        chosen.append(j)
        taken.scatter_(-1, j.unsqueeze(-1), True)
        _deflate(E, j)
    return torch.stack(chosen, -1).reshape(*A.shape[:-2], k)


def greedy_det(A: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """The columns of :func:`cross_pivots`: each step multiplies |det A[I, J]| by the most that one element can."""
    return cross_pivots(A, k)[1]


def cross_pivots(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows I and columns J of Gaussian elimination with complete pivoting, a greedy maximum of |det A[I, J]|.

    Returns:
        Two tensors (..., k); the first pairs are those of the elimination's order.
    """
    A = prepared(A, k)
    pairs = [_cross(matrix.clone(), k) for matrix in A.reshape(-1, *A.shape[-2:])]
    rows, columns = (torch.stack(each).reshape(*A.shape[:-2], k) for each in zip(*pairs, strict=True))
    return rows, columns


def _cross(E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows: list[int] = []
    columns: list[int] = []
    for _ in range(k):
        i, j = divmod(int(E.abs().argmax()), E.shape[1])
        pivot = E[i, j].clone()
        if pivot == 0:
            break
        E -= torch.outer(E[:, j], E[i] / pivot)
        E[i], E[:, j] = 0, 0
        rows.append(i)
        columns.append(j)
    for chosen, count in ((rows, E.shape[0]), (columns, E.shape[1])):  # nothing is left: any others will do
        chosen += [i for i in range(count) if i not in set(chosen)][: k - len(chosen)]
    return torch.tensor(rows, device=E.device), torch.tensor(columns, device=E.device)


def basis_and_residual(A: Tensor | Operator, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """V' (..., k, n), E (..., p, n) whose columns have the geometry of those of A - A V V', and ||A||_2."""
    rows = 2 * k + 100
    if isinstance(A, Tensor) and min(A.shape[-2:]) <= 2 * rows:
        _, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return Vh[..., :k, :], S[..., k:, None] * Vh[..., k:, :], S[..., 0]
    _, S, Vh = dominant(A, k, seed=seed, power=2)
    G = sketch_rows(A, rows, seed=index(seed) ^ _FRESH) * rows**-0.5
    return Vh, G - G @ Vh.mH @ Vh, S[..., 0]


def residual_pivots(V: Tensor, E: Tensor, norm: Tensor) -> Tensor:
    """argmin |E_j|^2 / |V_j|^2 as often as V has rows, each time projecting V_j out of V and its share of E_j out of E.

    Args:
        V: (..., k, n), orthonormal rows.
        E: (..., p, n).
        norm: (...), of the matrix that E is left of: a residual of its rounding errors decides nothing.

    Returns:
        (..., k).
    """
    batch = V.shape[:-2]
    V, E = _columns(V), _columns(E)
    # Where nothing but rounding errors is left, this makes the length of V_j decide.
    eps = torch.finfo(V.dtype).eps
    floor = ((eps * norm).square() + torch.finfo(V.dtype).tiny).reshape(-1, 1)
    taken = torch.zeros(V.shape[:-1], dtype=torch.bool, device=V.device)
    chosen = []
    for _ in range(V.shape[-1]):
        length = _squares(V)
        score = (_squares(E) + floor) / length
        j = torch.where(taken | (length < 1e4 * eps**2), torch.inf, score).argmin(-1)
        chosen.append(j)
        taken.scatter_(-1, j.unsqueeze(-1), True)
        v, e = _at(V, j), _at(E, j)
        share = V @ v.mH / v.abs().square().sum(-1, keepdim=True)
        E.baddbmm_(share, e, alpha=-1)
        V.baddbmm_(share, v, alpha=-1)
    return torch.stack(chosen, -1).reshape(*batch, V.shape[-1])


def lu_pivots(T: Tensor) -> Tensor:
    """The rows that LU with partial pivoting brings to the top of a tall T (..., n, l), in order: (..., l)."""
    exchanges = torch.linalg.lu_factor_ex(T).pivots.long() - 1
    n, steps = T.shape[-2], exchanges.shape[-1]
    order = torch.arange(n, device=T.device).expand(*T.shape[:-2], n).clone()
    for t in range(steps):
        here, there = order[..., t : t + 1].clone(), exchanges[..., t : t + 1]
        order[..., t : t + 1] = order.gather(-1, there)
        order.scatter_(-1, there, here)
    return order[..., :steps]


@overload
def prepared(A: Tensor, k: int) -> Tensor: ...
@overload
def prepared(A: Tensor | Operator, k: int) -> Tensor | Operator: ...
def prepared(A: Tensor | Operator, k: int) -> Tensor | Operator:
    """A with its scale taken out where it could overflow; checks k.

    Raises:
        ConfigError: k is not in 1 ... min(m, n).
    """
    most = min(A.shape[-2:])
    if not 1 <= k <= most:
        raise ConfigError(f"cannot choose {k} columns of a matrix of shape {tuple(A.shape)}; expected 1 to {most}")
    if not isinstance(A, Tensor):
        return A
    A = A.detach()
    scale = safe_scale(A)
    return A if isinstance(scale, float) else A / scale


def _square(A: Tensor) -> Tensor:
    """At most as many rows as columns: the triangle of a tall A has columns of the same lengths and angles."""
    return torch.linalg.qr(A, mode="r").R if A.shape[-2] > A.shape[-1] else A


def _columns(A: Tensor) -> Tensor:
    """(batch, n, m): the columns as rows of a copy, next to each other in memory."""
    return A.reshape(prod(A.shape[:-2]), *A.shape[-2:]).mT.clone(memory_format=torch.contiguous_format)


def _squares(E: Tensor) -> Tensor:
    return torch.linalg.vector_norm(E, dim=-1).square()


def _at(E: Tensor, j: Tensor) -> Tensor:
    """(batch, 1, m): one column of each."""
    return E.gather(-2, j[:, None, None].expand(-1, 1, E.shape[-1]))


def _deflate(E: Tensor, j: Tensor) -> None:
    """Project column j out of all, in place."""
    e = _at(E, j)
    length = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    q = torch.where(length > 0, e / length, 0.0)
    E.baddbmm_(E @ q.mH, q, alpha=-1)
