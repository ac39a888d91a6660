"""Joining the processes that torchrun has started; one process alone has no process group at all.

Ranks form a mesh of replicas and shards: the shards of one replica hold one copy of weights and optimizer state
together, the replicas hold equal ones.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from quintic.core import ConfigError
from quintic.core.ranks import ALONE, Ranks

__all__ = ["join_ranks", "world_size"]

_TIMEOUT = timedelta(minutes=30)
_LET_GO = 0.2
"""Seconds."""


def world_size() -> int:
    """How many processes torchrun has started for this job; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        # Gloo's threads need the interpreter to let go of the last tensors that travelled; one of them that has not yet
        # come to it when the interpreter ends aborts the whole process, and nothing tells when they have.
        time.sleep(_LET_GO)
