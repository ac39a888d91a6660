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
        # By name and dtype: the memory, and views of it by shape, which take longer to make than to find.
        self._kept: dict[tuple[str, torch.dtype], tuple[Tensor, dict[tuple[int, ...], Tensor]]] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        flat, views = self._kept.get((name, dtype), (None, {}))
        if (found := views.get(shape := tuple(shape))) is not None:
            return found
        size = math.prod(shape)
        if size * dtype.itemsize > _KEPT_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        if flat is None or flat.numel() < size:
            flat, views = self._kept[name, dtype] = torch.empty(size, dtype=dtype, device=device), {}
        views[shape] = flat[:size].view(shape)
        return views[shape]
