"""Rows that come in blocks and need not fit into memory: every product is one pass over them."""

# ruff: noqa: D102 (the methods of a source are documented once, in Source)

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintic.core import DataError
from quintic.linalg.sketch import safe_range
from quintic.lowrank.matrices import check_finite, check_shape, frobenius, to_tensor
from quintic.lowrank.result import whole_number
from quintic.lowrank.source import Source

__all__ = ["RowBlocks"]


class RowBlocks(Source):
    """Rows that come in blocks and need not fit into memory; each product reads all of them once.

    Args:
        blocks: A numpy array or ``np.memmap`` (cut into blocks here), an iterable of arrays or tensors (b, n) that can
            be gone through again, or a function that returns a new iterator. A plain iterator can be read once only,
            which is what :func:`quintic.lowrank.read_once` does.
        shape: (m, n), where it is known; else the rows are counted by reading them once.
        height: Rows of a block that is cut from an array.

    Raises:
        DataError: The blocks do not fit together, are not finite, or there are no rows. A block without rows is passed
            over.

    Example:
        >>> blocks = RowBlocks([np.eye(3), np.zeros((2, 3))])
        >>> blocks.shape, blocks.passes
        ((5, 3), 1)
    """

    def __init__(
        self,
        blocks: np.ndarray | Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        shape: tuple[int, int] | None = None,
        height: int = 4096,
    ) -> None:
        self.passes = 0
        """How often all rows were read."""
        if not isinstance(blocks, np.ndarray | Iterable) and not callable(blocks):
            raise DataError(f"expected an array, blocks of rows or a function that gives them, found {blocks!r}")
        self._blocks, self._height = blocks, whole_number(height, None, "height")
        self.once = isinstance(blocks, Iterator)
        if isinstance(blocks, np.ndarray):
            check_shape(blocks.shape)
            shape, self.dtype = (blocks.shape[0], blocks.shape[1]), to_tensor(blocks[:1]).dtype
        elif self.once:
            shape = (0, 0)  # not known before they are read, and never asked for
        else:
            rows, columns = 0, 0
            for block in self._raw():
                rows, columns = rows + block.shape[0], block.shape[1]
                self.dtype, self.device = block.dtype, block.device
                if shape is not None:
                    break
            else:
                self.passes += 1
            shape = shape or (rows, columns)
        if not self.once:
            self.shape = check_shape(shape)

    def __iter__(self) -> Iterator[Tensor]:
        """The blocks, one pass."""
        peak, dtype = 0.0, torch.float64
        for block in self._raw():
            peak, dtype = max(peak, check_finite(block)), block.dtype
            if peak >= safe_range(dtype)[1]:
                raise _out_of_range(peak, dtype)
            yield block
        if 0 < peak <= safe_range(dtype)[0]:
            raise _out_of_range(peak, dtype)
        self.passes += 1

    def _raw(self) -> Iterator[Tensor]:
        if isinstance(self._blocks, np.ndarray):
            whole = self._blocks
            source: Iterable[Any] = (whole[i : i + self._height] for i in range(0, whole.shape[0], self._height))
        else:
            source = self._blocks() if callable(self._blocks) else self._blocks
        first = None
        for block in source:
            block = to_tensor(block)
            if block.ndim == 2 and not block.shape[0]:
                continue  # a part of the rows that had none
            first = block if first is None else first
            if block.ndim != 2 or block.shape[1] != first.shape[-1] or block.dtype != first.dtype:
                raise DataError(
                    f"a block of rows has shape {tuple(block.shape)} and is computed in {block.dtype}; "
                    f"expected (b, {first.shape[-1]}) and {first.dtype} as for the first"
                )
            yield block

    def _placed(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks and where they begin."""
        at = 0
        for block in self:
            yield at, block
            at += block.shape[0]
        if at != self.shape[0]:
            raise DataError(
                f"the blocks have {at} rows together, expected {self.shape[0]}; are they the same each time?"
            )

    def matmat(self, X: Tensor, /) -> Tensor:
        return torch.cat([block @ X for _, block in self._placed()])

    def rmatmat(self, X: Tensor, /) -> Tensor:
        total = torch.zeros(self.shape[1], X.shape[1], dtype=self.dtype, device=self.device)
        for at, block in self._placed():
            total += block.mH @ X[at : at + block.shape[0]]
        return total

    def columns(self, at: Tensor) -> Tensor:
        return torch.cat([block[:, at] for _, block in self._placed()])

    def rows(self, at: Tensor) -> Tensor:
        found = torch.empty(at.shape[0], self.shape[1], dtype=self.dtype, device=self.device)
        for start, block in self._placed():
            here = (at >= start) & (at < start + block.shape[0])
            found[here] = block[at[here] - start]
        return found

    def residual(self, left: Tensor, right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        off, whole = [], []
        for at, block in self._placed():
            off.append(frobenius(block - left[at : at + block.shape[0]] @ right))
            whole.append(frobenius(block))
        return torch.linalg.vector_norm(torch.stack(off)), torch.linalg.vector_norm(torch.stack(whole))


def _out_of_range(peak: float, dtype: torch.dtype) -> DataError:
    wider = "" if torch.finfo(dtype).bits == 64 else ", or give them in float64"
    return DataError(
        f"the largest element is {peak:.3g}, and squares of it leave the range of {dtype}; divide the rows by it{wider}"
    )
