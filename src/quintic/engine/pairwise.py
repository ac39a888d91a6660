"""All-gather and reduce-scatter for CPUs: every rank sends each other rank its part at once.

Gloo passes parts around a ring, and copies and waits between the rounds; here parts go straight to who needs them, as
many bytes in all. Sums are taken in the order of ranks, so that they do not depend on the way that messages took. What
:func:`torch.distributed.fsdp.fully_shard` takes by ``set_custom_all_gather`` and ``set_custom_reduce_scatter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["AllGather", "ReduceScatter"]


class _Messages:
    """What both have in common: memory, and an exchange with all peers."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the parts of all ranks, or for one."""
        return torch.empty(size, dtype=dtype, device=device)

    @staticmethod
    def exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Send each peer its tensor and receive one of each; by rank, that of this rank is left alone."""
        own, world = group.rank(), group.size()
        operations = []
        for far in range(1, world):  # not all at first to the same peer
            to, source = (own + far) % world, (own - far) % world
            operations.append(dist.P2POp(dist.isend, sent[to], group=group, group_peer=to))
            operations.append(dist.P2POp(dist.irecv, received[source], group=group, group_peer=source))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


class AllGather(_Messages):
    """Every rank gets the parts of all."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather.

        Args:
            output_tensor: (ranks * n,).
            input_tensor: (n,), perhaps this rank's part of the output.
            group: Those who gather.
            async_op: Must be False.
        """
        assert not async_op
        parts = output_tensor.view(group.size(), -1)
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        self.exchange([own] * len(parts), list(parts), group)


class ReduceScatter(_Messages):
    """Every rank gets the sum of one part over all."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Sum.

        Args:
            output_tensor: (n,).
            input_tensor: (ranks * n,).
            group: Those who sum.
            op: Must be a sum.
            async_op: Must be False.
        """
        assert op == dist.ReduceOp.SUM and not async_op
        parts = list(input_tensor.view(group.size(), -1))
        terms = [part if rank == group.rank() else torch.empty_like(part) for rank, part in enumerate(parts)]
        self.exchange(parts, terms, group)
        torch.add(terms[0], terms[1], out=output_tensor)
        for term in terms[2:]:
            output_tensor.add_(term)
