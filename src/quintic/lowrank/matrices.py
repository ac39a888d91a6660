"""What is given, as tensors that can be computed with, or an error that says why not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintic.core import DataError
from quintic.linalg.sketch import safe_scale

__all__ = [
    "WORKED_IN",
    "check_finite",
    "check_finite_at",
    "check_shape",
    "frobenius",
    "to_tensor",
    "usable_scale",
]

WORKED_IN = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""What is computed in."""


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a matrix or a batch, or a DataError."""
    shape = tuple(int(n) for n in shape)
    if len(shape) < 2 or 0 in shape:
        raise DataError(f"expected a matrix with at least one row and one column, found shape {shape}")
    return shape


def to_tensor(A: Any) -> Tensor:
    """A tensor in a dtype that is computed in, without a copy where possible."""
    if not isinstance(A, Tensor):
        if np.ma.is_masked(A):
            raise DataError("the array has masked elements; fill them in, or leave out their rows or columns")
        try:
            A = np.asarray(A)
        except ValueError as error:  # lists of unequal lengths
            raise DataError(f"expected a matrix of numbers: {error}") from None
        if A.dtype.kind not in "biufc" or A.dtype.itemsize > (16 if A.dtype.kind == "c" else 8):
            raise DataError(f"expected a matrix of numbers, found dtype {A.dtype}")
        if not A.dtype.isnative or any(step < 0 for step in A.strides):
            A = A.astype(A.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only arrays: nothing is ever written to them here
            A = torch.from_numpy(A)
    if A.dtype in WORKED_IN:
        return A
    if A.is_complex():
        return A.to(torch.complex64)
    return A.float() if A.is_floating_point() else A.double()


def check_finite(tensor: Tensor) -> float:
    """The largest magnitude of an element (of a part of it, if complex); a DataError if one is not finite."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    # The extremes are finite exactly if all elements are, and cost a single pass.
    low, high = torch.aminmax(real)
    if not (low.isfinite() and high.isfinite()):
        wrong = (~tensor.isfinite()).nonzero()
        place = ", ".join(str(i) for i in wrong[0].tolist())
        raise DataError(
            f"element ({place}) is {tensor[tuple(wrong[0])].item()}, one of {len(wrong)} that are not finite; "
            "remove such rows or columns, or fill them in"
        )
    return max(-float(low), float(high))


def check_finite_at(place: Tensor, values: Tensor) -> None:
    """A DataError if one of the values at places (2, count) is not finite."""
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0, 0])
        at = ", ".join(str(i) for i in place[:, bad].tolist())
        raise DataError(f"element ({at}) is {values[bad].item()}, which is not finite")


def usable_scale(values: Tensor) -> float | Tensor:
    """:func:`quintic.linalg.sketch.safe_scale`, or a DataError where numbers have lost digits already."""
    scale, tiny = safe_scale(values), torch.finfo(values.dtype).tiny
    if isinstance(scale, Tensor) and (scale < tiny).any():
        raise DataError(
            f"the largest element of a matrix is below {tiny:.3g}, where numbers of {values.dtype} have fewer digits "
            "and no inverses; multiply the matrix by a large number before it comes to that"
        )
    return scale


def frobenius(part: Tensor) -> Tensor:
    """The norm of each matrix."""
    return torch.linalg.vector_norm(part, dim=(-2, -1))
