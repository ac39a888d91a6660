"""The processes that train together, as torchrun starts them; one process alone has no process group at all.

Ranks form a mesh of replicas and shards: the shards of one replica hold one copy of weights and optimizer state
together, the replicas hold equal ones. What the loop asks of them is small: sums of numbers, agreement on a flag, an
order of who goes first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from quintic.core import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "Ranks", "join_ranks", "world_size"]

_TIMEOUT = timedelta(minutes=30)


def world_size() -> int:
    """How many processes torchrun has started for this job; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Example:
        >>> alone = Ranks()
        >>> alone.is_main, alone.sum(2.5, 1), alone.any(False)
        (True, (2.5, 1.0), False)
    """

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    """("replicate", "shard"); None for one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Sums over all ranks, in float64."""
        if self.mesh is None:
            return tuple(float(number) for number in numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(values)
        return tuple(values.tolist())

    def sum_(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; all ranks get the same answer."""
        return flag if self.mesh is None else self.sum(float(flag))[0] > 0

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs the body, then the others: what it has prepared they find."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


ALONE = Ranks()
"""One process that trains by itself."""


@contextlib.contextmanager
def join_ranks(device: torch.device, shards: int = 0) -> Iterator[Ranks]:
    """Join the process group that torchrun has announced, and leave it at the end.

    Args:
        device: Of training; its type chooses gloo or NCCL.
        shards: Ranks that share one copy of weights and optimizer state; 0 is all of them.

    Yields:
        This process's place; ``ALONE`` if there is only one.

    Raises:
        ConfigError: The ranks do not divide into groups of that many shards.
    """
    world = world_size()
    if world == 1:
        yield ALONE
        return
    shards = shards or world
    if world % shards:
        raise ConfigError(f"engine.shards = {shards} does not divide the {world} ranks of this job")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from torch.distributed.device_mesh import init_device_mesh

    # CPU tensors always have a group of their own: counts and flags must not wait for a GPU.
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))
        yield Ranks(dist.get_rank(), world, mesh)
    finally:
        dist.destroy_process_group()
