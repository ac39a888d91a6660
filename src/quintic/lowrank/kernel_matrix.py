"""The kernel matrix of given points, computed block by block and never held: A[i, j] = k(x_i, x_j)."""

# ruff: noqa: D102 (the methods of a source are documented once, in Source)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.lowrank.matrices import check_finite, to_tensor
from quintic.lowrank.row_blocks import RowBlocks
from quintic.lowrank.source import PART, Source

__all__ = ["KernelMatrix"]


class KernelMatrix(RowBlocks):
    """A kernel and its points, which can be decomposed like the matrix (n, n) that they make.

    Besides the results a block of 4 million elements is held at a time. A product evaluates all n^2 elements once, and
    so does an error. Of the rules, ``quality`` takes seven products and ``fast`` three; ``uniform`` and given indices
    take none, and then n k elements are all that is computed. For very many points let a rule choose within a sample of
    them, ``indices=sample[select_columns(kernel(X[sample], X[sample]), k)]``.

    Args:
        kernel: A function of points (a, ...) and (b, ...) with values (a, b), Hermitian and positive semi-definite,
            such as ``sklearn.metrics.pairwise.rbf_kernel``.
        points: (n, ...): tensor, numpy array or scipy sparse matrix; slices and indexed rows of it go to the kernel.
            Tensors give tensors, with gradients to the points and whatever the kernel is made of, and everything else
            numpy arrays.

    Raises:
        ConfigError: The kernel is no function.
        DataError: There are no points, or the kernel's values have the wrong shape or are not finite.

    Example:
        >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)
        >>> KernelMatrix(lambda x, y: torch.exp(-(x[:, None] - y).square()), x).shape
        (50, 50)
    """

    def __init__(self, kernel: Callable[[Any, Any], Any], points: Any) -> None:
        if not callable(kernel):
            raise ConfigError(f"expected a function kernel(X, Y) and its points, found {kernel!r}")
        points = _as_points(points)
        count = points.shape[0]
        if not count:
            raise DataError("expected at least one point, found none")
        self.kernel, self.points = kernel, points
        self.returns_tensors = isinstance(points, Tensor)
        if isinstance(points, Tensor):
            self.device = points.device

        # One row of two columns: the whole matrix would be a price for its dtype.
        (values,) = _strips(kernel, points[:1], points[:2])
        self.passes, self.shape, self.dtype = 0, (count, count), values.dtype
        # Without gradients: what is summed over all blocks would hold all of them.
        self._blocks = lambda: (strip.detach() for strip in _strips(kernel, points, points))

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return self.matmat(X)

    def columns(self, at: Tensor) -> Tensor:
        return torch.cat(list(_strips(self.kernel, self.points, self.points_at(at))))

    def rows(self, at: Tensor) -> Tensor:
        return self.columns(at).mH

    @property
    def H(self) -> Source:
        return self

    def points_at(self, at: Tensor) -> Any:
        """Some of the points."""
        return self.points[at if isinstance(self.points, Tensor) else at.numpy(force=True)]

    def to_points(self, new: Any, at: Tensor) -> Tensor:
        """The kernel of new points (l, ...) with some of the given ones: (l, k)."""
        new = _as_points(new)
        if isinstance(new, Tensor) != isinstance(self.points, Tensor) or new.shape[1:] != self.points.shape[1:]:
            raise DataError(
                f"new points are a {type(new).__name__} of shape {tuple(new.shape)}; expected a "
                f"{type(self.points).__name__} of shape {('l', *self.points.shape[1:])} as the given ones"
            )
        if not new.shape[0]:
            return torch.zeros(0, at.shape[-1], dtype=self.dtype, device=self.device)
        return torch.cat(list(_strips(self.kernel, new, self.points_at(at))))


def _as_points(given: Any) -> Any:
    """What can be sliced, and indexed by positions."""
    if isinstance(given, Tensor):
        points = given
    else:
        points = given.tocsr() if hasattr(given, "tocsr") else np.asarray(given)
    if points.ndim < 1:
        raise DataError(f"expected points (n, ...), found {given!r}")
    return points


def _strips(kernel: Callable[[Any, Any], Any], X: Any, Y: Any) -> Iterator[Tensor]:
    """The kernel of X and Y, some points of X at a time."""
    height = max(1, PART // Y.shape[0])
    for start in range(0, X.shape[0], height):
        part = X[start : start + height]
        values, shape = to_tensor(kernel(part, Y)), (part.shape[0], Y.shape[0])
        if tuple(values.shape) != shape:
            raise DataError(
                f"the kernel of {shape[0]} and {shape[1]} points has shape {tuple(values.shape)}; expected {shape}"
            )
        check_finite(values.detach())
        yield values
