"""Weights, gradients and optimizer state divided among ranks: torch's own ``fully_shard`` by declared roles.

Every member of a module list (a block) is gathered on its own while it is at work, the rest of the model once. Small
blocks that follow each other are gathered together, and a small model whole: a message costs time, however short it is.
An expert stack is divided by expert when there are enough, so that an optimizer of matrices finds whole matrices on
every rank; any other tensor by its first axis. Models know nothing of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from quintic.core.ranks import Ranks
from quintic.core.roles import Role, declared_roles
from quintic.engine.pairwise import AllGather, ReduceScatter

__all__ = ["divide_", "gathered_apart", "put_away", "sum_over_replicas", "whole"]

TOGETHER = 32 * 2**20
"""Bytes of weights, up to which they are gathered together."""


def divide_(model: nn.Module, ranks: Ranks, *, reshard: bool = True) -> None:
    """Divide a model's parameters among the ranks, in place; nothing for one process.

    Gradients are summed over ranks, not averaged: the loop divides by the number of elements that all ranks counted.

    Args:
        model: Equal on all ranks, roles declared.
        ranks: The mesh.
        reshard: Put gathered blocks away after a forward pass and gather them again for the backward pass.
    """
    if ranks.mesh is None:
        return
    shards = ranks.mesh["shard"].size()
    stacks = {id(p) for name, p in model.named_parameters() if declared_roles(model)[name].role is Role.EXPERT_STACK}

    def placement(parameter: nn.Parameter) -> Shard:
        few = id(parameter) in stacks and parameter.shape[0] < shards and parameter.shape[1] % shards == 0
        return Shard(1) if few else Shard(0)

    mesh = ranks.mesh if ranks.world > shards else ranks.mesh["shard"]  # else gradients are summed over one replica
    for modules in (*reversed(gathered_apart(model)), [model]):  # inner blocks first: the outer takes what is left
        divided = modules[0]
        between = reshard and divided is not model  # which is needed again as soon as the forward pass has ended
        fully_shard(modules, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=between)
        assert isinstance(divided, FSDPModule)
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)  # else float32 asks for an operation that gloo lacks
        if ranks.mesh.device_type == "cpu":
            # The base classes that torch names have no public name.
            divided.set_custom_all_gather(AllGather())  # pyright: ignore[reportArgumentType]
            divided.set_custom_reduce_scatter(ReduceScatter())  # pyright: ignore[reportArgumentType]


def gathered_apart(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of blocks that are gathered by themselves, in order; the rest of the model is gathered once.

    Example:
        >>> blocks = [nn.Linear(1024, 1024, device="meta") for _ in range(10)]
        >>> [len(group) for group in gathered_apart(nn.Sequential(nn.ModuleList(blocks)))]
        [7, 3]
        >>> gathered_apart(nn.Sequential(nn.ModuleList(blocks[:3])))
        []
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # A flow, whose blocks hold blocks, calls each of them by itself, and so each must be gathered by itself.
    nested = any(isinstance(inner, nn.ModuleList) for blocks in lists for block in blocks for inner in block.modules())
    if not nested and _bytes(model) <= TOGETHER:
        return []
    return [group for blocks in lists for group in _together(blocks, 0 if nested else TOGETHER)]


def _together(blocks: nn.ModuleList, most: int) -> list[list[nn.Module]]:
    """Blocks that follow each other, in groups of at most so many bytes; larger ones alone."""
    groups: list[list[nn.Module]] = []
    left = 0
    for block in blocks:
        size = _bytes(block)
        if not groups or size > left:
            groups.append([])
            left = most
        groups[-1].append(block)
        left -= size
    return groups


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


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
