"""Gaussian sketches: a large matrix seen through a few random combinations of its rows.

    Y = Omega A          Omega (l, m) with independent N(0, 1) elements, l far below m

The columns of Y have nearly the angles and (times sqrt(l)) the lengths of those of A: what is chosen or measured on Y
holds for A. Power steps Omega <- Omega A A' sharpen the dominant directions where the singular values fall slowly
(Halko, Martinsson, Tropp, "Finding structure with randomness", 2011). The same probes measure what is known by products
only: E ||A w||^2 = ||A||_F^2.

A matrix here is a tensor (..., m, n) or an :class:`Operator`. Random numbers are drawn on the CPU from the seed, so
that every device gets the same ones, and the same ones serve every matrix of a batch: a matrix gets the same answer
in any batch.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from quintic.core import ConfigError

__all__ = [
    "Dominant",
    "Operator",
    "adjoint_times",
    "dominant",
    "gaussian",
    "probe_norm",
    "safe_range",
    "safe_scale",
    "seeded",
    "sketch_rows",
    "times",
]

OVERSAMPLING = 10
"""Rows of a sketch beyond the rank that is asked of it; more gains little."""


@runtime_checkable
class Operator(Protocol):
    """A matrix known by its products. A scipy ``LinearOperator`` is one; so is any object with these four names.

    With a numpy dtype the blocks that go in and out are numpy arrays, with a torch dtype they are tensors.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""
        ...

    @property
    def dtype(self) -> Any:
        """Of its elements."""
        ...

    def matmat(self, X: Any, /) -> Any:
        """A X for X (n, l)."""
        ...

    def rmatmat(self, X: Any, /) -> Any:
        """A' X for X (m, l), A' the conjugate transpose."""
        ...


class Dominant(NamedTuple):
    """The leading singular triples: A is near U diag(S) Vh."""

    U: Tensor
    """(..., m, k), orthonormal columns."""
    S: Tensor
    """(..., k), descending."""
    Vh: Tensor
    """(..., k, n), orthonormal rows."""


def times(A: Tensor | Operator, X: Tensor) -> Tensor:
    """A X."""
    return A @ X if isinstance(A, Tensor) else A.matmat(X)


def adjoint_times(A: Tensor | Operator, X: Tensor) -> Tensor:
    """A' X."""
    return A.mH @ X if isinstance(A, Tensor) else A.rmatmat(X)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU.

    Raises:
        ConfigError: The seed is no integer of 64 bits.
    """
    try:
        return torch.Generator(device="cpu").manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"seed = {seed!r}; expected an integer of at most 64 bits") from None


def gaussian(rows: int, columns: int, seed: int, like: Tensor | torch.dtype, device: Any = None) -> Tensor:
    """(rows, columns) of independent N(0, 1), or complex ones of variance 1: a pure function of shape, seed and dtype.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        seed: Any integer.
        like: A tensor whose dtype and device are wanted, or a dtype.
        device: With a dtype only.
    """
    if isinstance(like, Tensor):
        like, device = like.dtype, like.device
    return torch.randn((rows, columns), generator=seeded(seed), dtype=like, device="cpu").to(device)


def sketch_rows(A: Tensor | Operator, size: int, *, seed: int = 0, power: int = 0) -> Tensor:
    """Y = Omega A, or with power steps Omega (A A')^power A with orthonormalisation between the products.

    Args:
        A: (..., m, n).
        size: Rows of the sketch.
        seed: Of Omega.
        power: Steps; each costs two more passes over A.

    Returns:
        (..., size, n).
    """
    Y = adjoint_times(A, _gaussian_like(A, A.shape[-2], size, seed))
    for _ in range(power):
        Y = adjoint_times(A, torch.linalg.qr(times(A, torch.linalg.qr(Y).Q)).Q)
    return Y.mH


def dominant(A: Tensor | Operator, rank: int, *, seed: int = 0, power: int = 1) -> Dominant:
    """The leading ``rank`` singular triples: exact for small tensors, else by a randomised range finder.

    Exact where the shorter side is at most four times the sketch, since it then costs no more.

    Args:
        A: (..., m, n).
        rank: At most min(m, n).
        seed: Of the sketch.
        power: Power steps of the sketch; each costs two passes over A.

    Example:
        >>> dominant(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).S
        tensor([3., 2.])
    """
    size = rank + OVERSAMPLING
    if isinstance(A, Tensor) and min(A.shape[-2:]) <= 4 * size:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    else:
        size = min(size, *A.shape[-2:])
        Q = torch.linalg.qr(sketch_rows(A, size, seed=seed, power=power).mH).Q
        U, S, Wh = torch.linalg.svd(times(A, Q), full_matrices=False)
        Vh = Wh @ Q.mH
    return Dominant(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def probe_norm(products: Tensor) -> tuple[Tensor, Tensor]:
    """||A||_F^2 from products with Gaussian probes, and how far off it may be.

    Args:
        products: (m, s), A w for s independent probes w.

    Returns:
        The estimate, and a bound of its standard deviation that is itself estimated from the products:
        Var(mean |A w|^2) = 2 ||A'A||_F^2 / s for real w (half of it for complex w).

    Example:
        >>> A = torch.eye(100)
        >>> mean, deviation = probe_norm(A @ gaussian(100, 500, 0, A))
        >>> bool((mean - 100).abs() < 3 * deviation)
        True
    """
    gram = products.mH @ products
    count = products.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    # With its diagonal the mean square of the Gram matrix exceeds ||A'A||_F^2, which errs to the safe side.
    fourth = gram.abs().square().mean((-2, -1))
    return mean, (2.0 * fourth / count).sqrt()


def safe_range(dtype: torch.dtype) -> tuple[float, float]:
    """Magnitudes between which squares, and their sums and rounding errors, stay within the range of a dtype."""
    least = torch.finfo(dtype).tiny ** (1 / 3)
    return least, 1 / least


def safe_scale(values: Tensor) -> float | Tensor:
    """A power of two near each matrix's largest magnitude where squares could leave the range of the dtype, else 1.

    Args:
        values: (..., m, n), or (n,) for a bare list of elements.

    Returns:
        1.0 if no matrix needs it, else (..., 1, 1).
    """
    values = values.detach()
    if values.numel() == 0:
        return 1.0
    # The largest part of a complex number is within sqrt(2) of its magnitude, and cannot overflow.
    real = torch.view_as_real(values.resolve_conj()).flatten(-2) if values.is_complex() else values
    axes = (-2, -1) if real.ndim > 1 else (-1,)
    low, high = real.amin(axes, keepdim=True), real.amax(axes, keepdim=True)
    peak = torch.maximum(-low, high)
    least, most = safe_range(values.dtype)
    safe = (peak == 0) | ((peak > least) & (peak < most))
    if safe.all():
        return 1.0
    return torch.where(safe, 1.0, torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 1))


def _gaussian_like(A: Tensor | Operator, rows: int, columns: int, seed: int) -> Tensor:
    return gaussian(rows, columns, seed, A.dtype, A.device if isinstance(A, Tensor) else getattr(A, "device", None))
