"""Which part of a divided tensor (DTensor) lies with this process, known from its layout without communication."""

from __future__ import annotations

from torch import Tensor

from quintic.core.errors import ConfigError

__all__ = ["region"]


def region(tensor: Tensor) -> tuple[list[int], list[int]]:
    """First index and length, on every axis, of what this process holds; of a tensor that is not divided all of it.

    Raises:
        ConfigError: Its layout is strided, as of fully_shard over tensor parallelism, or partial.

    Example:
        >>> import torch
        >>> region(torch.zeros(3, 4))
        ([0, 0], [3, 4])
    """
    start, sizes = [0] * tensor.ndim, list(tensor.shape)
    for axis, placement in enumerate(getattr(tensor, "placements", ())):
        if not (placement.is_shard() or placement.is_replicate()):  # strided: what is here may not be one piece
            raise ConfigError(
                f"a tensor laid out as {placement} over its mesh cannot be filled or stored part by part; divide it by "
                "fully_shard alone, without tensor parallelism, or gather it first"
            )
        if placement.is_shard():  # as torch.chunk cuts: the last parts may be short or empty
            dim, mesh = placement.dim, tensor.device_mesh  # type: ignore[attr-defined]
            step = -(-sizes[dim] // mesh.size(axis))
            before = min(sizes[dim], step * mesh.get_local_rank(axis))
            start[dim] += before
            sizes[dim] = min(step, sizes[dim] - before)
    return start, sizes
