"""Buffers that are used again, since on CPUs fresh memory costs more than what is done in it.

The system hands out memory page by page at the first touch, about a microsecond for each 4 KiB. For a stack of small
matrices that is a tenth of the time of their Newton-Schulz iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Workspace"]

_KEPT_BYTES = 8 * 2**20  # a larger buffer is not kept: what is computed in it takes far longer than to get it


class Workspace:
    """Buffers by name. One that was asked for is overwritten by the next user of its name.

    Accelerators have an allocator that does the same, so there nothing is kept.

    Example:
        >>> space = Workspace()
        >>> a = space.get("a", (2, 3), torch.float32, torch.device("cpu"))
        >>> a.shape, space.get("a", (1, 4), torch.float32, torch.device("cpu")).data_ptr() == a.data_ptr()
        (torch.Size([2, 3]), True)
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape)
        if device.type != "cpu" or size * dtype.itemsize > _KEPT_BYTES or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)
