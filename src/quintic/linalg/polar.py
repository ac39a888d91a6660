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

from contextlib import nullcontext

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.core.machine import fast_dtype
from quintic.linalg.coefficients import Coefficients, Schedule, resolve_schedule

__all__ = ["METHODS", "choose_method", "msign"]

METHODS = ("auto", "newton-schulz", "gram", "svd")
"""Names accepted by :func:`msign`."""

_GRAM_ASPECT = 2  # from here on Gram's saving exceeds the cost of its extra small products
_GRAM_DTYPES = (torch.float32, torch.float64)
_CACHED_ELEMENTS = 2**17  # on CPUs, matrices worked on at a time: all steps of a part run within the cache


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
    return "gram" if long >= _GRAM_ASPECT * short and dtype in _GRAM_DTYPES else "newton-schulz"


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
    non-finite element gives NaN and leaves the rest of the batch alone. Differentiable.

    Args:
        M: (..., n, m), floating, any strides; empty axes are fine.
        method: ``auto`` (:func:`choose_method`), ``newton-schulz``, ``gram`` or ``svd``.
        steps: Polynomial steps; ``None`` is 5, or the length of a listed schedule. Not used by ``svd``.
        coefficients: Preset name, triple or triples, see :mod:`quintic.linalg.coefficients`. Not used by ``svd``.
        dtype: Dtype of the products. ``None``: float64 for float64 input, else bfloat16 where the hardware
            has matrix units for it and float32 elsewhere.

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
    if M.ndim < 2 or not M.is_floating_point():
        raise ConfigError(
            f"msign needs real floating matrices (..., n, m), found shape {tuple(M.shape)} of {M.dtype}; "
            "reshape, or view a complex matrix as a real one"
        )
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{suggest(method, METHODS)}")
    schedule = resolve_schedule(coefficients, steps)
    if M.numel() == 0:
        return M.clone()
    if dtype is None:
        dtype = torch.float64 if M.dtype == torch.float64 else fast_dtype(M.device)
    if method == "auto":
        method = choose_method(M.shape[-2], M.shape[-1], dtype)
    if method == "gram" and dtype not in _GRAM_DTYPES:
        raise ConfigError(
            f"method 'gram' loses all accuracy in {dtype}; use 'newton-schulz', or dtype=torch.float32 or float64"
        )
    if method == "svd" and dtype not in _GRAM_DTYPES:
        dtype = torch.float32  # no half-precision decomposition exists

    compute = {"svd": _svd, "gram": _gram, "newton-schulz": _newton_schulz}[method]
    matrices = M.reshape(-1, *M.shape[-2:])
    fitting = max(1, _CACHED_ELEMENTS // (M.shape[-2] * M.shape[-1]))
    kind = M.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        if kind != "cpu" or len(matrices) <= fitting or (torch.is_grad_enabled() and M.requires_grad):
            out = compute(_normalized(matrices).to(dtype), schedule)
            return out.reshape(M.shape).to(M.dtype)
        out = torch.empty_like(matrices, memory_format=torch.contiguous_format)
        for part, done in zip(matrices.split(fitting), out.split(fitting), strict=True):
            done.copy_(compute(_normalized(part).to(dtype), schedule))
        return out.reshape(M.shape)


def _normalized(M: Tensor) -> Tensor:
    """M / ||M||_F per matrix in at least float32, without overflow or underflow; zero stays zero."""
    X = M if M.dtype == torch.float64 else M.float()
    peak = X.detach().abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(peak > 0, peak, 1.0)
    # The largest element is now exactly 1, so that the norm is at least 1 except for a zero matrix.
    return X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=1.0)


class _Products:
    """Products from the short side, into buffers that are used again unless autograd needs the intermediates."""

    def __init__(self, X: Tensor) -> None:
        self.reuse = not (torch.is_grad_enabled() and X.requires_grad)
        self.wide = X.shape[-2] <= X.shape[-1]
        self.short = min(X.shape[-2:])

    def small(self, X: Tensor, count: int) -> list[Tensor | None]:
        """Uninitialised buffers of the shape of X's Gram matrix."""
        shape = (*X.shape[:-2], self.short, self.short)
        return [X.new_empty(shape) if self.reuse else None for _ in range(count)]

    def gram(self, X: Tensor, out: Tensor | None) -> Tensor:
        """X X^T, or X^T X if X is tall."""
        return torch.bmm(X, X.mT, out=out) if self.wide else torch.bmm(X.mT, X, out=out)

    def apply(self, P: Tensor, X: Tensor, a: float, out: Tensor | None) -> Tensor:
        """a X + P X, or a X + X P if X is tall."""
        return torch.baddbmm(X, P, X, beta=a, out=out) if self.wide else torch.baddbmm(X, X, P, beta=a, out=out)


def _newton_schulz(X: Tensor, schedule: Schedule) -> Tensor:
    do = _Products(X)
    a_out, p_out = do.small(X, 2)
    here = X
    there = torch.empty_like(X) if do.reuse else None
    for a, b, c in schedule:
        A = do.gram(here, a_out)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c, out=p_out)
        moved = do.apply(P, here, a, there)
        here, there = moved, (here if do.reuse else None)
    return here


def _gram(X: Tensor, schedule: Schedule) -> Tensor:
    """Symbols: R = X X^T; one step multiplies X by P = a I + Z, Z = b R + c R^2, hence R by P twice.

    Q collects the product of the P. After two steps, and after every three from there on, Q is applied to X
    and R computed anew: rounding errors of R grow with the square of the slope at 0.
    """
    do = _Products(X)
    r, rz, z, q, q_other = do.small(X, 5)
    segments = [schedule[:2], *(schedule[i : i + 3] for i in range(2, len(schedule), 3))]
    spare = torch.empty_like(X) if do.reuse else None
    for segment in segments:
        R = do.gram(X, r)
        Q: Tensor | None = None
        for i, (a, b, c) in enumerate(segment):
            Z = torch.baddbmm(R, R, R, beta=b, alpha=c, out=z)
            if i < len(segment) - 1:
                RP = torch.baddbmm(R, R, Z, beta=a, out=rz)
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
        moved = torch.bmm(Q, X, out=spare) if do.wide else torch.bmm(X, Q, out=spare)
        X, spare = moved, (X if do.reuse else None)
    return X


def _svd(X: Tensor, schedule: Schedule) -> Tensor:
    """Exact; takes the schedule only to have the signature of the others."""
    if min(X.shape[-2:]) == 1:
        return X  # normalised already
    # LAPACK refuses a whole batch for one non-finite element.
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    U, S, Vh = torch.linalg.svd(X.masked_fill(~finite, 0.0), full_matrices=False)
    floor = S[..., :1] * (max(X.shape[-2:]) * torch.finfo(X.dtype).eps)
    kept = U * S.gt(floor).to(X.dtype).unsqueeze(-2)
    return (kept @ Vh).masked_fill(~finite, torch.nan)
