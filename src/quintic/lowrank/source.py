"""What can be decomposed: tensors, arrays, sparse matrices, operators and row blocks, seen through one small interface.

A source knows its shape, its products A X and A' X, its columns and rows by index, and how far a pair of factors is
from it. A selection rule or a factorisation needs no more, and therefore works on all of them:

* :class:`Dense`: a tensor (..., m, n) or numpy array; the only one with a batch, and with gradients;
* :class:`Sparse`: a scipy or torch sparse matrix;
* :class:`Products`: an operator (:class:`quintic.linalg.sketch.Operator`, scipy's ``LinearOperator`` among them);
* :class:`quintic.lowrank.RowBlocks`: rows that come in blocks, from a memory-mapped file or any iterable: out of core;
* :class:`quintic.lowrank.KernelMatrix`: a kernel and its points.

Integers and booleans are computed in float64, half precision in float32. Matrices of so large or small a scale that
squares of it would overflow or underflow are computed at scale 1. Tensors give tensors, everything else numpy arrays.
"""

# ruff: noqa: D102 (the methods of a source are documented once, in Source)

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.linalg.sketch import Operator, gaussian, probe_norm
from quintic.lowrank.matrices import (
    WORKED_IN,
    check_finite,
    check_finite_at,
    check_shape,
    frobenius,
    to_tensor,
    usable_scale,
)
from quintic.lowrank.residual import residual_of_thin

__all__ = ["PART", "Dense", "Products", "Source", "Sparse", "as_source"]

PART = 2**22
"""Elements of a residual, or of a matrix that is computed, that are formed at a time."""
_PROBES = 32


class Source(ABC):
    """A matrix of which products, columns and rows can be had. Everything inside is a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    exact = True
    """Whether :meth:`residual` is exact; else it is an estimate from probes."""
    returns_tensors = False
    """Whether results go out as tensors; else as numpy arrays."""
    once = False
    """Whether it can be read a single time only."""
    scale: float | Tensor = 1.0
    """What :meth:`matmat` and :meth:`rmatmat` have to be multiplied by to be those of the matrix that was given."""

    @abstractmethod
    def matmat(self, X: Tensor, /) -> Tensor:
        """A X at scale 1."""

    @abstractmethod
    def rmatmat(self, X: Tensor, /) -> Tensor:
        """A' X at scale 1."""

    @abstractmethod
    def columns(self, at: Tensor) -> Tensor:
        """(..., m, k): the columns at these positions, as given."""

    @abstractmethod
    def rows(self, at: Tensor) -> Tensor:
        """(..., k, n): the rows at these positions, as given."""

    @abstractmethod
    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """||A - left right||_F and ||A||_F at scale 1, for factors of the matrix as given."""

    @property
    def H(self) -> Source:
        """The conjugate transpose."""
        return _Adjoint(self)

    def out(self, tensor: Tensor) -> Any:
        """A tensor in the kind that was given."""
        return tensor.resolve_conj() if self.returns_tensors else tensor.numpy(force=True)

    def into(self, part: Any) -> Tensor:
        """What :meth:`out` gave, as a tensor where the matrix lies."""
        return (part if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part))).to(self.device)


class Dense(Source):
    """A tensor, batched or not."""

    def __init__(self, given: Tensor, *, returns_tensors: bool = True) -> None:
        self.given = given
        self.shape, self.dtype, self.device = tuple(given.shape), given.dtype, given.device
        self.returns_tensors = returns_tensors
        self.scale = usable_scale(given)
        self.tensor = given if isinstance(self.scale, float) else given / self.scale

    def matmat(self, X: Tensor, /) -> Tensor:
        return self.tensor @ X

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return self.tensor.mH @ X

    def columns(self, at: Tensor) -> Tensor:
        return self.given.gather(-1, at.unsqueeze(-2).expand(*self.shape[:-1], -1))

    def rows(self, at: Tensor) -> Tensor:
        return self.given.gather(-2, at.unsqueeze(-1).expand(*self.shape[:-2], -1, self.shape[-1]))

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        left = left / self.scale
        height = max(1, PART // (self.shape[-1] * math.prod(self.shape[:-2])))
        off, whole = [], []
        for start in range(0, self.shape[-2], height):
            part = self.tensor[..., start : start + height, :]
            off.append(frobenius(part - left[..., start : start + height, :] @ right))
            whole.append(frobenius(part))
        return torch.linalg.vector_norm(torch.stack(off), dim=0), torch.linalg.vector_norm(torch.stack(whole), dim=0)

    @property
    def H(self) -> Source:
        return Dense(self.given.mH, returns_tensors=self.returns_tensors)


class Sparse(Source):
    """Compressed rows, and compressed rows of the conjugate transpose, which are its columns."""

    def __init__(self, forward: Tensor, adjoint: Tensor, *, returns_tensors: bool) -> None:
        self.scale = usable_scale(forward.values())
        self.forward, self.adjoint = forward, adjoint
        self.shape, self.dtype, self.device = tuple(forward.shape), forward.dtype, forward.device
        self.returns_tensors = returns_tensors

    def matmat(self, X: Tensor, /) -> Tensor:
        return (self.forward @ X) / self.scale

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return (self.adjoint @ X) / self.scale

    def columns(self, at: Tensor) -> Tensor:
        return _sparse_rows(self.adjoint, at).mH

    def rows(self, at: Tensor) -> Tensor:
        return _sparse_rows(self.forward, at)

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        A = self.forward
        values = A.values().to(torch.promote_types(self.dtype, torch.float64)) / self.scale
        at = A.crow_indices(), A.col_indices()
        A = torch.sparse_csr_tensor(*at, values, self.shape, device=values.device, check_invariants=False)
        whole = torch.linalg.vector_norm(values)
        off = residual_of_thin(A, whole, left, right, self.scale)
        return (self._dense_residual(left, right) if off is None else off), whole

    def _dense_residual(self, left: Tensor, right: Tensor) -> Tensor:
        left = left / self.scale
        height = max(1, PART // self.shape[1])
        off = []
        for start in range(0, self.shape[0], height):
            at = torch.arange(start, min(start + height, self.shape[0]), device=self.device)
            off.append(frobenius(self.rows(at) / self.scale - left[at] @ right))
        return torch.linalg.vector_norm(torch.stack(off))


class Products(Source):
    """An operator. Columns are products with those of the identity; the residual is estimated from Gaussian probes.

    What cannot be looked at shows its scale by one product with a single vector.
    """

    exact = False

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.shape = check_shape(operator.shape)
        if len(self.shape) != 2:
            raise DataError(f"expected an operator (m, n), found shape {self.shape}; operators are taken one at a time")
        self.returns_tensors = isinstance(operator.dtype, torch.dtype)
        if self.returns_tensors:
            self.dtype = operator.dtype
        elif operator.dtype is None:
            self.dtype = torch.float64
        else:
            self.dtype = torch.from_numpy(np.empty(0, operator.dtype)).dtype
        if self.dtype not in WORKED_IN:
            self.dtype = torch.float64
        self.device = torch.device(getattr(operator, "device", None) or "cpu")
        try:
            seen = self.rmatmat(gaussian(self.shape[0], 1, 0, self.dtype, self.device))
        except (TypeError, NotImplementedError) as error:  # which is how those of scipy say that they have none
            raise DataError(
                f"the operator gives no product with its conjugate transpose ({error}); "
                "expected rmatmat, or rmatvec of a LinearOperator"
            ) from error
        self.scale = usable_scale(seen)

    def matmat(self, X: Tensor, /) -> Tensor:
        return self._checked(self.operator.matmat(self.out(X)), (self.shape[0], X.shape[1]))

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return self._checked(self.operator.rmatmat(self.out(X)), (self.shape[1], X.shape[1]))

    def columns(self, at: Tensor) -> Tensor:
        return self.matmat(_identity_columns(self.shape[1], at, self.dtype)) * self.scale

    def rows(self, at: Tensor) -> Tensor:
        return self.rmatmat(_identity_columns(self.shape[0], at, self.dtype)).mH * self.scale

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        W = gaussian(self.shape[1], _PROBES, seed, self.dtype, self.device)
        AW = self.matmat(W)
        off, whole = probe_norm(AW - left / self.scale @ (right @ W))[0], probe_norm(AW)[0]
        return off.sqrt(), whole.sqrt()

    def _checked(self, product: Any, shape: tuple[int, int]) -> Tensor:
        product = torch.as_tensor(product, device=self.device).to(self.dtype)
        if tuple(product.shape) != shape:
            raise DataError(f"the operator gave a product of shape {tuple(product.shape)}, expected {shape}")
        if not product.isfinite().all():
            raise DataError("a product of the operator has elements that are not finite")
        return product / self.scale


class _Adjoint(Source):
    """The conjugate transpose of a source that has no cheaper one."""

    def __init__(self, of: Source) -> None:
        self.of = of
        self.shape, self.dtype, self.device = (of.shape[1], of.shape[0]), of.dtype, of.device
        self.exact, self.returns_tensors, self.scale = of.exact, of.returns_tensors, of.scale

    def matmat(self, X: Tensor, /) -> Tensor:
        return self.of.rmatmat(X)

    def rmatmat(self, X: Tensor, /) -> Tensor:
        return self.of.matmat(X)

    def columns(self, at: Tensor) -> Tensor:
        return self.of.rows(at).mH

    def rows(self, at: Tensor) -> Tensor:
        return self.of.columns(at).mH

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        return self.of.residual(right.mH, left.mH, seed)

    @property
    def H(self) -> Source:
        return self.of


def as_source(A: Any) -> Source:
    """Whatever a user has, as a source.

    Raises:
        ConfigError: Rows that can be read only once.
        DataError: It is no matrix, is empty, or has an element that is not finite.
    """
    if isinstance(A, Iterator) or (isinstance(A, Source) and A.once):
        raise ConfigError(
            "these rows can be read only once: give a list, a memory-mapped array or a function that makes the blocks "
            "(quintic.lowrank.RowBlocks), or use quintic.lowrank.read_once(blocks, rank)"
        )
    if isinstance(A, Source):
        return A
    if isinstance(A, Tensor):
        if A.layout != torch.strided:
            _check_single(A.shape)
            A = A.detach().to_sparse_coo().coalesce()
            return _sparse(A.indices(), to_tensor(A.values()), A.shape, returns_tensors=True)
    elif hasattr(A, "tocsr"):  # a scipy sparse matrix or array
        return _sparse_of_scipy(A)
    elif not isinstance(A, np.ndarray) and isinstance(A, Operator):
        return Products(A)
    elif callable(A):
        raise DataError(
            "found a function, expected a matrix; a kernel and its points are one as KernelMatrix(kernel, X), "
            "and a function that gives blocks of rows as RowBlocks(function)"
        )
    tensor = to_tensor(A)
    check_shape(tensor.shape)
    check_finite(tensor.detach())
    return Dense(tensor, returns_tensors=isinstance(A, Tensor))


def _sparse_of_scipy(A: Any) -> Sparse:
    """Its own compressed rows and columns, which scipy makes faster than coordinates are sorted here."""
    _check_single(A.shape)
    csr = A.tocsr()
    csr = csr.astype(to_tensor(csr.data[:1]).numpy().dtype, copy=False)
    if not csr.has_canonical_format:  # elements at the same place add up
        csr = csr.copy()
        csr.sum_duplicates()
    if not np.isfinite(csr.data).all():
        coo = csr.tocoo()
        check_finite_at(torch.from_numpy(np.stack([coo.row, coo.col])), torch.from_numpy(coo.data))

    def compressed(part: Any) -> Tensor:
        first, at = (torch.from_numpy(each.astype(np.int64)) for each in (part.indptr, part.indices))
        values = to_tensor(part.data)
        return torch.sparse_csr_tensor(first, at, values, part.shape, device="cpu", check_invariants=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as below
        return Sparse(compressed(csr), compressed(csr.conj(copy=False).T.tocsr()), returns_tensors=False)


def _check_single(shape: Any) -> tuple[int, int]:
    """Rows and columns of a sparse matrix, of which there are no batches."""
    shape = check_shape(shape)
    if len(shape) != 2:
        raise DataError(f"expected a sparse matrix (m, n), found shape {shape}; sparse ones are taken one at a time")
    return shape[0], shape[1]


def _sparse(place: Tensor, values: Tensor, shape: Any, *, returns_tensors: bool) -> Sparse:
    """From coordinates (2, count); elements at the same place add up."""
    rows, columns = shape
    check_finite_at(place, values)

    def compressed(place: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
        coo = torch.sparse_coo_tensor(place, values, (rows, columns), device=values.device, check_invariants=False)
        return coo.coalesce().to_sparse_csr()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls compressed rows a beta feature, once a process
        forward = compressed(place, values, rows, columns)
        adjoint = compressed(place.flip(0), values.conj().resolve_conj(), columns, rows)
    return Sparse(forward, adjoint, returns_tensors=returns_tensors)


def _sparse_rows(csr: Tensor, at: Tensor) -> Tensor:
    """Rows of compressed rows, as a dense matrix."""
    first, last = csr.crow_indices()[at], csr.crow_indices()[at + 1]
    counts = last - first
    row = torch.arange(at.shape[0], device=at.device).repeat_interleave(counts)
    place = torch.arange(row.shape[0], device=at.device) + (first - counts.cumsum(0) + counts).repeat_interleave(counts)
    dense = torch.zeros(at.shape[0], csr.shape[1], dtype=csr.dtype, device=csr.device)
    dense[row, csr.col_indices()[place]] = csr.values()[place]
    return dense


def _identity_columns(size: int, at: Tensor, dtype: torch.dtype) -> Tensor:
    columns = torch.zeros(size, at.shape[0], dtype=dtype, device=at.device)
    columns[at, torch.arange(at.shape[0], device=at.device)] = 1
    return columns
