"""What a decomposition gives back: two thin factors, how good they are, and where they come from.

    A ~ left right          left (..., m, k), right (..., k, n)

The pair is what to compute with: both factors are as well conditioned as the kind of decomposition allows. Everything
is of the kind that was given: tensors for tensors, numpy arrays for the rest. A result is an operator itself, which can
be decomposed again, or become one of scipy by ``aslinearoperator``. It keeps the matrix, not a copy, to tell its error
from; keep ``left`` and ``right`` alone where the matrix is to be freed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.linalg.sketch import gaussian, probe_norm
from quintic.lowrank.source import Source

__all__ = ["Approximation", "check_rank", "labels_at", "positions", "search_rank", "whole_number", "within"]

_TOLERANCE_SEED = 0x5DEECE66D
_SURE = 5.0
"""Standard deviations by which an estimated residual has to be below a tolerance: Laurent and Massart's bound for the
lower tail of a weighted sum of chi-squares gives exp(-_SURE**2 / 2) = 4e-6."""
_MOST_PROBES = 512


@dataclass(frozen=True, eq=False, repr=False)
class Approximation:
    """A ~ left right."""

    left: Any
    """(..., m, k)."""
    right: Any
    """(..., k, n)."""
    method: str
    """How the columns and rows were chosen."""
    source: Source
    """The matrix that was decomposed; not a copy, so it lives and changes with the caller's."""

    @property
    def rank(self) -> int:
        """k, the inner dimension."""
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    def reconstruct(self) -> Any:
        """The approximation as a full matrix (..., m, n)."""
        return self.left @ self.right

    @property
    def dtype(self) -> Any:
        """Of both factors."""
        return self.left.dtype

    @property
    def device(self) -> Any:
        """Of both factors."""
        return self.left.device

    def matvec(self, x: Any) -> Any:
        """The approximation times a vector x (..., n) for each matrix: (..., m), in O((m + n) k).

        Raises:
            DataError: A vector has another length.
        """
        return _times(self.left, self.right, x)

    def rmatvec(self, x: Any) -> Any:
        """Its conjugate transpose times a vector x (..., m) for each matrix: (..., n)."""
        return _times(_adjoint(self.right), _adjoint(self.left), x)

    def matmat(self, X: Any) -> Any:
        """The approximation times a matrix (..., n, l)."""
        return self.left @ (self.right @ X)

    def rmatmat(self, X: Any) -> Any:
        """Its conjugate transpose times a matrix (..., m, l)."""
        return _adjoint(self.right) @ (_adjoint(self.left) @ X)

    def __matmul__(self, X: Any) -> Any:
        """The approximation times a matrix (..., n, l)."""
        return self.matmat(X)

    def __rmatmul__(self, X: Any) -> Any:
        """A matrix (..., l, m) times the approximation."""
        return (X @ self.left) @ self.right

    __array_ufunc__ = None
    """Arrays leave ``X @ approximation`` to the approximation."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The full matrix, for ``numpy.asarray``."""
        whole = self.reconstruct()
        whole = whole.numpy(force=True) if isinstance(whole, Tensor) else whole
        return whole if dtype is None else whole.astype(dtype)

    def error(self) -> Any:
        """||A - left right||_F / ||A||_F: 0 for a zero matrix that is met exactly.

        Exact for matrices in memory and row blocks (one pass), from 32 Gaussian probes for operators (relative standard
        deviation at most 1/4, and far less unless a single direction dominates what is left).

        The first call reads the matrix, as it is then, at the cost of a product left right, or of one with k vectors if
        the matrix is sparse and the error above about 1e-3; later ones repeat what it said. So ask before the matrix is
        changed. A search by ``tol`` has asked, except of an operator.

        Returns:
            A float, or a tensor or array (...) of a batch.
        """
        return self._error

    @functools.cached_property
    def _error(self) -> Any:
        with torch.no_grad():
            off, whole = self.source.residual(self.source.into(self.left), self.source.into(self.right))
        error = torch.where(whole > 0, off / whole, torch.where(off > 0, torch.inf, 0.0))
        return error.item() if error.ndim == 0 else self.source.out(error)

    def __repr__(self) -> str:
        size = " x ".join(str(n) for n in self.shape)
        # Debuggers and failing tests print what they meet: nothing is computed here, and no file is read.
        error = f", {self._error_words()}" if "_error" in self.__dict__ else ""
        return f"{type(self).__name__}({size}, {self._rank_words()}{error}, method '{self.method}')"

    def _rank_words(self) -> str:
        return f"rank {self.rank}"

    def _error_words(self) -> str:
        error = self.error()
        about = "" if self.source.exact else "about "
        if isinstance(error, float):
            return f"relative error {about}{error:.3g}"
        return f"relative errors {about}{error.min():.3g} to {error.max():.3g}"


def _adjoint(factor: Any) -> Any:
    return factor.mH if isinstance(factor, Tensor) else factor.conj().swapaxes(-1, -2)


def _times(left: Any, right: Any, x: Any) -> Any:
    length = right.shape[-1]
    if tuple(x.shape) == (length, 1) and right.ndim == 2:  # a column, which scipy takes for a vector too
        return left @ (right @ x)
    if not x.shape or x.shape[-1] != length:
        raise DataError(f"expected vectors (..., {length}), found shape {tuple(x.shape)}")
    return (left @ (right @ x[..., None]))[..., 0]


def check_rank(rank: int, source: Source, what: str = "rank") -> int:
    """A usable rank, or an error that says which are."""
    size = " x ".join(str(n) for n in source.shape[-2:])
    return whole_number(rank, min(source.shape[-2:]), what, f" for a matrix of {size}")


def whole_number(given: Any, most: int | None, what: str, of: str = "") -> int:
    """An integer of any kind from 1 to ``most``, or an error that says so."""
    reach = "1 or more" if most is None else f"1 to {most}"
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None or number < 1 or (most is not None and number > most):
        whole = ", a whole number" if number is None else ""
        raise ConfigError(f"{what} = {given!r}; expected {reach}{of}{whole}")
    return number


def positions(given: Any, count: int, source: Source, what: str) -> Tensor:
    """Indices that a user fixed, as (..., k), counted from the start."""
    try:
        at = torch.as_tensor(given, device=source.device)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{what} has to be a list of positions, found {given!r}") from None
    if at.ndim < 1 or at.shape[-1] == 0 or at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
        raise ConfigError(f"{what} has to be a list of positions, found {given!r}")
    at = at.long()
    if ((at < -count) | (at >= count)).any():
        raise ConfigError(f"{what} has positions from {at.min()} to {at.max()}; expected 0 to {count - 1}")
    at = torch.where(at < 0, at + count, at)
    batch = source.shape[:-2]
    if at.ndim > 1 and at.shape[:-1] != batch:
        each = f" or ({', '.join(map(str, batch))}, k)" if batch else ""
        raise ConfigError(f"{what} have shape {tuple(at.shape)}; expected (k,){each}")
    return at.expand(*batch, at.shape[-1])


def labels_at(labels: Sequence[Any] | None, at: Any, count: int, what: str) -> list[Any] | None:
    """The labels of chosen columns or rows."""
    if labels is None:
        return None
    if len(labels) != count:
        raise DataError(f"{len(labels)} {what} for {count} of them")
    if at.ndim > 1:
        raise ConfigError(f"{what} are for a single matrix, not for a batch")
    return [labels[int(i)] for i in at]


_Found = TypeVar("_Found", bound=Approximation)


def search_rank(attempt: Callable[[int], _Found], source: Source, tol: float) -> _Found:
    """The approximation of smallest rank whose relative residual is at most ``tol``, by doubling and bisection.

    Every attempt is checked by :func:`within`, and the smallest that passed is returned; a batch gets one rank, with
    which all of its matrices pass.

    Raises:
        ConfigError: The tolerance is not in (0, 1), or no rank that was tried, up to the full one, reaches it.
    """
    if not isinstance(tol, SupportsFloat) or not 0 < float(tol) < 1:
        raise ConfigError(f"tol = {tol!r}; expected a relative error between 0 and 1")
    most = min(source.shape[-2:])
    below, rank = 0, min(8, most)
    found, nearest = attempt(rank), (math.inf, rank)
    while not within(found, tol):
        nearest = min(nearest, (_worst(found), rank))
        if rank == most:
            wider = "" if torch.finfo(source.dtype).bits == 64 else " or give the matrix in float64"
            raise ConfigError(
                f"tol = {tol:g} is out of reach: rank {nearest[1]} comes nearest of those tried up to {most}, and "
                f"leaves {nearest[0]:.1e} in {source.dtype}; raise tol{wider}"
            )
        below, rank = rank, min(2 * rank, most)
        found = attempt(rank)
    while rank - below > 1:
        middle = (below + rank) // 2
        if within(tried := attempt(middle), tol):
            rank, found = middle, tried
        else:
            below = middle
    return found


def within(found: Approximation, tol: float) -> bool:
    """Whether the relative residual is at most ``tol``: exact in memory, by fresh probes for operators.

    For an operator the approximation has to be an orthogonal projection of A or a part A >= A~ of a semi-definite A, so
    that ||A||_F^2 >= ||A~||_F^2 + ||E||_F^2. The number of probes is doubled until the residual is below the tolerance
    with certainty, above it by its estimate, or 512 probes do not tell.
    """
    if found.source.exact:
        return _worst(found) <= tol
    left, right = found.source.into(found.left) / found.source.scale, found.source.into(found.right)
    kept = torch.linalg.vector_norm(torch.linalg.qr(left, mode="r").R @ right).square()
    count, products = 0, []
    while count < _MOST_PROBES:
        more = max(32, count)
        W = gaussian(right.shape[-1], more, _TOLERANCE_SEED + 977 * found.rank + count, left.dtype, left.device)
        products.append(found.source.matmat(W) - left @ (right @ W))
        count += more
        mean, deviation = probe_norm(torch.cat(products, -1))
        if mean == 0:
            return True
        if mean > tol**2 * (kept + mean):
            return False
        share = _SURE * deviation / mean
        if share < 1:
            bound = mean / (1 - share)
            if bound <= tol**2 * (kept + bound):
                return True
    return False


def _worst(found: Approximation) -> float:
    error = found.error()
    return error if isinstance(error, float) else float(error.max())
