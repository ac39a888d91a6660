"""What a process holds of a divided tensor is known, or refused where it may not be one piece."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from quintic.core import ConfigError
from quintic.core.divided import region


class Mesh:
    def __init__(self, sizes, ranks):
        self.sizes, self.ranks = sizes, ranks

    def size(self, axis):
        return self.sizes[axis]

    def get_local_rank(self, axis):
        return self.ranks[axis]


def divided(shape, placements, mesh):
    return SimpleNamespace(shape=shape, ndim=len(shape), placements=placements, device_mesh=mesh)


@pytest.mark.parametrize("rank", range(6))
def test_parts_are_those_of_chunk_axis_by_axis(rank):
    whole = torch.arange(7 * 5).view(7, 5)
    ranks = divmod(rank, 3)
    for placements, axes in (
        ((Shard(0), Shard(1)), (0, 1)),
        ((Shard(1), Shard(1)), (1, 1)),
        ((Replicate(), Shard(0)), (None, 0)),
    ):
        expected = whole
        for axis, count, mine in zip(axes, (2, 3), ranks, strict=True):
            if axis is not None:
                parts = expected.chunk(count, axis)
                expected = parts[mine] if mine < len(parts) else expected.narrow(axis, 0, 0)
        start, sizes = region(divided((7, 5), placements, Mesh((2, 3), ranks)))  # type: ignore[arg-type]
        found = whole[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("placement", [_StridedShard(0, split_factor=2), Partial()])
def test_what_may_not_be_one_piece_is_refused(placement):
    with pytest.raises(ConfigError, match="without tensor parallelism"):
        region(divided((8, 4), (placement, Shard(0)), Mesh((2, 2), (0, 0))))  # type: ignore[arg-type]
