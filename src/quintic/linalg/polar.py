"""msign(M) = U_r V_r^T for M = U S V^T of rank r: every non-zero singular value becomes 1.

Equivalently (M M^T)^(-1/2) M, the polar factor of M, and for square full-rank M the nearest orthogonal matrix.
It is the direction of steepest descent under a spectral-norm trust region (post kexue.fm/archives/10592).

Three ways to it, for X = M / ||M||_F with n rows, m columns and n <= m:

* newton-schulz: X <- a X + (b A + c A^2) X with A = X X^T, T times; 4 n^2 m + 2 n^3 flops per step;
* gram: the same polynomial in the n x n matrix R = X X^T, applied to X at the end (Dao-AILab's Gram
  Newton-Schulz): fewer flops from m >= 1.5 n on. It needs the mantissa of float32, and restarts to keep it exact;
* svd: exact, slow; singular values below the rounding error count as zero.

All leading axes are a batch: (..., n, m). For n > m the products run from the right instead, without a transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.core.machine import fast_dtype
from quintic.linalg.coefficients import Coefficients, Schedule, resolve_schedule
from quintic.linalg.spectral import check_matrices
from quintic.linalg.workspace import Workspace

__all__ = ["METHODS", "choose_method", "msign", "msign_"]

METHODS = ("auto", "newton-schulz", "gram", "svd")
"""Names accepted by :func:`msign`."""

_GRAM_ASPECT = 2  # from here on Gram's saving exceeds the cost of its extra small products
_WIDE = (torch.float32, torch.float64)
# On CPUs, of all buffers that a thread works in at a time: all steps run within a cache of 2 MiB.
_CACHED_BYTES = 7 * 2**18
_SAFE_NORMS = (1e-12, 1e18)  # the squares of elements that matter neither overflow nor vanish in float32


def choose_method(rows: int, columns: int, dtype: torch.dtype) -> str:
    """The method ``auto`` stands for: a pure function of shape and working dtype.

    Vectors (one row or column) are normalised, which is their exact SVD; matrices at least twice as long
    as wide take the Gram form in float32 or float64; all others take Newton-Schulz.

    Example:
        >>> choose_method(128, 512, torch.float32), choose_method(128, 512, torch.bfloat16)
        ('gram', 'newton-schulz')
    """
    short, long = sorted((rows, columns))
    if short == 1:
        return "svd"
    return "gram" if long >= _GRAM_ASPECT * short and dtype in _WIDE else "newton-schulz"


def msign(
    M: Tensor,
    *,
    method: str = "auto",
    steps: int | None = None,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix sign of the last two axes; M itself is never modified.

    Scale-invariant over the whole range of the dtype. A zero matrix gives exactly zero. A matrix with a
    non-finite element gives NaN and leaves the rest of the batch alone. Differentiable where M has full rank; elsewhere
    msign jumps, ``svd`` gives the derivative at constant rank, and polynomials give their own, steep one.

    Args:
        M: (..., n, m), floating, any strides; empty axes are fine.
        method: ``auto`` (:func:`choose_method`), ``newton-schulz``, ``gram`` or ``svd``.
        steps: Polynomial steps; ``None`` is 5, or the length of a listed schedule. Not used by ``svd``.
        coefficients: Preset name, triple or triples, see :mod:`quintic.linalg.coefficients`. Not used by ``svd``.
        dtype: Dtype of the products. ``None``: float64 for float64 input; else float32 on CPUs, for ``gram`` and for
            ``svd``, and on accelerators what they have matrix units for. Bfloat16 is faster on CPUs with AMX, but
            fills the null space of rank-deficient matrices with rounding errors of order 1.

    Returns:
        (..., n, m) in M's dtype. With the default five steps singular values from 1% of the Frobenius norm on end
        within 0.978 and 1.032; ``coefficients="exact"`` brings them to 1 within 1e-5.

    Raises:
        ConfigError: M is not a floating (..., n, m) tensor, the method or coefficients are unknown, or
            ``gram`` is asked for in half precision.

    Example:
        >>> msign(torch.tensor([[3.0, 0.0], [0.0, -1e-3]]), method="svd")
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    form, schedule, dtype = _resolved(M, method, steps, coefficients, dtype)
    if torch.is_grad_enabled() and M.requires_grad and M.numel():
        with _no_autocast(M.device):
            matrices = M.reshape(-1, *M.shape[-2:])
            return form.run(_normalized(matrices).to(dtype), None, schedule, None).reshape(M.shape).to(M.dtype)
    out = torch.empty_like(M, memory_format=torch.contiguous_format)
    _by_parts(M, out, form, schedule, dtype)
    return out


@torch.no_grad()
def msign_(
    M: Tensor,
    *,
    method: str = "auto",
    steps: int | None = None,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype | None = None,
    space: Workspace | None = None,
) -> Tensor:
    """:func:`msign` in place, for a contiguous M: the working memory is that of a few matrices, in ``space`` if given.

    Example:
        >>> M = torch.tensor([[3.0, 4.0]])
        >>> msign_(M) is M, M
        (True, tensor([[0.6000, 0.8000]]))
    """
    _by_parts(M, M, *_resolved(M, method, steps, coefficients, dtype), space)
    return M


def _resolved(
    M: Tensor, method: str, steps: int | None, coefficients: Coefficients, dtype: torch.dtype | None
) -> tuple[_Form, Schedule, torch.dtype]:
    """How, with what polynomials, and in which dtype; all arguments checked."""
    check_matrices(M)
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{suggest(method, METHODS)}")
    schedule = resolve_schedule(coefficients, steps)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype = {dtype!r}; expected None or a real floating dtype, such as torch.bfloat16")
    if dtype is None:
        dtype = _accurate_dtype(M, method)
    if method == "auto":
        method = choose_method(M.shape[-2], M.shape[-1], dtype)
    if method == "gram" and dtype not in _WIDE:
        raise ConfigError(
            f"method 'gram' loses all accuracy in {dtype}; use 'newton-schulz', or dtype=torch.float32 or float64"
        )
    if method == "svd" and dtype not in _WIDE:
        dtype = torch.float32  # no half-precision decomposition exists
    return _FORMS[method], schedule, dtype


def _accurate_dtype(M: Tensor, method: str) -> torch.dtype:
    """The dtype of the products where none was asked for."""
    if M.dtype == torch.float64:
        return torch.float64
    return torch.float32 if method in ("gram", "svd") else fast_dtype(M.device)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _by_parts(
    M: Tensor, out: Tensor, form: _Form, schedule: Schedule, dtype: torch.dtype, space: Workspace | None = None
) -> None:
    """Msign of M into contiguous ``out``, which may be M; without autograd."""
    if not M.numel():
        return
    n, m = M.shape[-2:]
    matrices, results = M.reshape(-1, n, m), out.view(-1, n, m)
    if torch.compiler.is_compiling():  # which finds memory for itself, and falls apart at ours
        with torch.no_grad(), _no_autocast(M.device):
            results.copy_(form.run(_normalized(matrices).to(dtype), None, schedule, None))
        return
    fitting = len(matrices)
    if M.device.type == "cpu":
        each = (2 * n * m + form.squares * min(n, m) ** 2) * dtype.itemsize
        most = max(1, _CACHED_BYTES * torch.get_num_threads() // each)
        fitting = -(-len(matrices) // -(-len(matrices) // most))  # equal parts
    space = space or Workspace()
    wide = torch.promote_types(M.dtype, torch.float32)
    with torch.no_grad(), _no_autocast(M.device):
        for part, result in zip(matrices.split(fitting), results.split(fitting), strict=True):
            spare = space.get("spare", part.shape, wide, M.device)
            if dtype == wide == result.dtype:
                # Back and forth between the result and the spare, so as to end in the result.
                here, there = (spare, result) if form.moves(schedule) % 2 else (result, spare)
                done = form.run(_normalized(part, here), there, schedule, space)
            else:
                X = _normalized(part, spare)
                if dtype != wide:
                    # Lying down: torch's half-precision product into a transposed tensor takes 1,000 times as long.
                    flip = n > m
                    lower = space.get("lower", (len(part), min(n, m), max(n, m)), dtype, M.device)
                    lower.copy_(X.mT if flip else X)
                    X = lower.mT if flip else lower
                done = form.run(X, None, schedule, space)
            if done.data_ptr() != result.data_ptr():
                result.copy_(done)


class _Form(NamedTuple):
    """One way to the matrix sign."""

    run: Callable[[Tensor, Tensor | None, Schedule, Workspace | None], Tensor]
    """(X of norm 1, spare of its shape or None, polynomials, buffers) -> msign of X.

    With buffers X is overwritten, and it and the spare hold its iterates in turns, the last one the result. Without,
    as autograd needs it, all are tensors of their own.
    """
    moves: Callable[[Schedule], int]
    """How often the iterate moves from X to the spare or back."""
    squares: int
    """Buffers of the shape of Gram matrices."""


def _squares(space: Workspace | None, X: Tensor, *names: str) -> list[Tensor | None]:
    """Buffers of the shape of X's Gram matrices; none at all where autograd needs the intermediates."""
    if space is None:
        return [None] * len(names)
    short = min(X.shape[-2:])
    return [space.get(name, (*X.shape[:-2], short, short), X.dtype, X.device) for name in names]


def _normalized(M: Tensor, out: Tensor | None = None) -> Tensor:
    """M / ||M||_F per matrix in at least float32, without overflow or underflow; zero stays zero."""
    X = M if M.dtype == torch.float64 else M.float()
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    # Elsewhere looking would wait; a safe matrix gets the same numbers either way.
    if X.device.type != "cpu" or torch.compiler.is_compiling() or not _all_between(norm, *_SAFE_NORMS):
        safe = (norm > _SAFE_NORMS[0]) & (norm < _SAFE_NORMS[1])
        fixed = X.detach()
        peak = torch.maximum(fixed.amax((-2, -1), keepdim=True), -fixed.amin((-2, -1), keepdim=True))
        # The least normal number has an inverse; beside it denormals are still visible.
        X = torch.mul(X, torch.where(safe, 1.0, peak.clamp(min=torch.finfo(X.dtype).tiny).reciprocal()), out=out)
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
        norm = torch.where(norm == 0, 1.0, norm)  # NaN stays
    return torch.mul(X, norm.reciprocal(), out=out)  # twice as fast as a division


def _all_between(values: Tensor, low: float, high: float) -> bool:
    least, largest = torch.aminmax(values.detach())
    return low < least.item() and largest.item() < high  # false for NaN


def _other(X: Tensor, spare: Tensor | None, space: Workspace | None) -> Tensor | None:
    """Where the next iterate goes."""
    if space is None or spare is not None:
        return spare
    return space.get("long", X.shape, X.dtype, X.device)


def _newton_schulz(X: Tensor, spare: Tensor | None, schedule: Schedule, space: Workspace | None) -> Tensor:
    if X.shape[-2] > X.shape[-1]:
        return _newton_schulz(X.mT, None if spare is None else spare.mT, schedule, space).mT
    gram, polynomial = _squares(space, X, "gram", "polynomial")
    diagonal = None if polynomial is None else polynomial.diagonal(dim1=-2, dim2=-1)
    there = _other(X, spare, space)
    # A pass over X less with a on the diagonal; in half precision rounding it there would double the error.
    on_diagonal = X.dtype in _WIDE
    for a, b, c in schedule:
        A = torch.bmm(X, X.mT, out=gram)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c, out=polynomial)
        if on_diagonal:
            (P.diagonal(dim1=-2, dim2=-1) if diagonal is None else diagonal).add_(a)
            new = torch.bmm(P, X, out=there)
        else:
            new = torch.baddbmm(X, P, X, beta=a, out=there)
        X, there = new, (None if there is None else X)
    return X


def _gram(X: Tensor, spare: Tensor | None, schedule: Schedule, space: Workspace | None) -> Tensor:
    """Symbols: R = X X^T; one step multiplies X by P = a I + Z, Z = b R + c R^2, hence R by P twice.

    Q collects the product of the P. After two steps, and after every three from there on, Q is applied to X
    and R computed anew: rounding errors of R grow with the square of the slope at 0.
    """
    if X.shape[-2] > X.shape[-1]:
        return _gram(X.mT, None if spare is None else spare.mT, schedule, space).mT
    r, rp, z, q, q_other = _squares(space, X, "gram", "product", "polynomial", "q", "next q")
    there = _other(X, spare, space)
    for segment in _segments(schedule):
        R = torch.bmm(X, X.mT, out=r)
        Q: Tensor | None = None
        for i, (a, b, c) in enumerate(segment):
            Z = torch.baddbmm(R, R, R, beta=b, alpha=c, out=z)
            if i < len(segment) - 1:
                RP = torch.baddbmm(R, R, Z, beta=a, out=rp)
                next_R = torch.baddbmm(RP, RP, Z, beta=a, out=r)
            else:
                next_R = R
            if Q is None:
                Q = Z.clone() if q is None else q.copy_(Z)
                Q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                Q = torch.baddbmm(Q, Q, Z, beta=a, out=q_other)
                q, q_other = q_other, q
            R = next_R
        assert Q is not None
        X, there = torch.bmm(Q, X, out=there), (None if there is None else X)
    return X


def _segments(schedule: Schedule) -> list[Schedule]:
    """The steps between restarts of the Gram form."""
    return [schedule[:2], *(schedule[i : i + 3] for i in range(2, len(schedule), 3))]


def _svd(X: Tensor, spare: Tensor | None, schedule: Schedule, space: Workspace | None) -> Tensor:
    """Exact; has the arguments of the others and needs none but the first."""
    if min(X.shape[-2:]) == 1:
        return X  # normalised already
    # LAPACK refuses a whole batch for one non-finite element.
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return _PolarFactor.apply(X.masked_fill(~finite, 0.0)).masked_fill(~finite, torch.nan)


class _PolarFactor(torch.autograd.Function):
    """P = U V^T of X = U S V^T with a derivative that has no s_i - s_j below the line, as that of the svd has.

    dP = U ((A - A^T) / (s_i + s_j)) V^T + (I - U U^T) dX V S^-1 V^T + U S^-1 U^T dX (I - V V^T) with A = U^T dX V: it
    exists for equal singular values too. Those that count as zero are left out: the derivative at constant rank.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor) -> Tensor:
        U, _, Vh = _kept_svd(X)
        return U @ Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (G,) = gradients
        U, S, Vh = _kept_svd(*ctx.saved_tensors)
        pairs = S.unsqueeze(-1) + S.unsqueeze(-2)
        K = U.mT @ G @ Vh.mT
        within = (K - K.mT) / torch.where(pairs > 0, pairs, 1.0)
        inverse = torch.where(S > 0, 1 / torch.where(S > 0, S, 1.0), 0.0)
        right, left = G @ Vh.mT * inverse.unsqueeze(-2), inverse.unsqueeze(-1) * (U.mT @ G)
        right, left = right - U @ (U.mT @ right), left - left @ Vh.mT @ Vh
        return (U @ within + right) @ Vh + U @ left


def _kept_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T, with zeros for what belongs to singular values below the rounding error."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = S[..., :1] * (max(X.shape[-2:]) * torch.finfo(X.dtype).eps) < S
    return U * kept.unsqueeze(-2), S * kept, Vh * kept.unsqueeze(-1)


_FORMS = {
    "svd": _Form(_svd, lambda _: 0, 0),
    "gram": _Form(_gram, lambda schedule: len(_segments(schedule)), 5),
    "newton-schulz": _Form(_newton_schulz, len, 2),
}
