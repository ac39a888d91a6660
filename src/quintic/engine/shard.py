"""Weights, gradients and optimizer state divided among ranks: torch's own ``fully_shard`` by declared roles.

Every member of a module list (a block) is gathered on its own while it is at work, the rest of the model once. Small
blocks that follow each other are gathered together: a message costs time, however short it is. An expert stack is
divided by expert when there are enough, so that an optimizer of matrices finds whole matrices on every rank; any other
tensor by its first axis. Models know nothing of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from quintic.core.ranks import Ranks
from quintic.core.roles import Role, declared_roles

__all__ = ["divide_", "put_away", "sum_over_replicas", "whole"]

_MESSAGE = 32 * 2**20  # bytes of blocks that are gathered together


def divide_(model: nn.Module, ranks: Ranks, *, reshard: bool = True) -> None:
    """Divide a model's parameters among the ranks, in place; nothing for one process.

    Gradients are summed over ranks, not averaged: the loop divides by the number of elements that all ranks counted.

    Args:
        model: Equal on all ranks, roles declared.
        ranks: The mesh.
        reshard: Put gathered weights away after a forward pass and gather them again for the backward pass.
    """
    if ranks.mesh is None:
        return
    shards = ranks.mesh["shard"].size()
    stacks = {id(p) for name, p in model.named_parameters() if declared_roles(model)[name].role is Role.EXPERT_STACK}

    def placement(parameter: nn.Parameter) -> Shard:
        few = id(parameter) in stacks and parameter.shape[0] < shards and parameter.shape[1] % shards == 0
        return Shard(1) if few else Shard(0)

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    nested = any(isinstance(inner, nn.ModuleList) for blocks in lists for block in blocks for inner in block.modules())
    groups = [group for blocks in lists for group in _together(blocks, 0 if nested else _MESSAGE)]
    for modules in (*reversed(groups), [model]):  # a block within a block first: the outer one takes what is left
        fully_shard(modules, mesh=ranks.mesh, shard_placement_fn=placement, reshard_after_forward=reshard)
        divided = modules[0]
        assert isinstance(divided, FSDPModule)
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)  # else float32 asks for an operation that gloo lacks


def _together(blocks: nn.ModuleList, most: int) -> list[list[nn.Module]]:
    """Blocks that follow each other, in groups of at most so many bytes; larger ones alone."""
    groups: list[list[nn.Module]] = []
    left = 0
    for block in blocks:
        size = sum(p.numel() * p.element_size() for p in block.parameters())
        if not groups or size > left:
            groups.append([])
            left = most
        groups[-1].append(block)
        left -= size
    return groups


def sum_over_replicas(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over replicas, or leaves that to a later one of the same step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


@contextlib.contextmanager
def put_away(model: nn.Module, *, whole: bool = False) -> Iterator[None]:
    """Weights that are gathered inside, without a backward pass, are put away: else they would outlive their change.

    Args:
        model: Divided or not.
        whole: Gather all of them, for what looks at weights outside of a forward pass.
    """
    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in divided if whole else ():
            module.unshard()
        yield
    finally:
        for module in divided:
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor, on every rank; all ranks must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
