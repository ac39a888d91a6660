"""Weights, gradients and optimizer state divided among ranks: torch's own ``fully_shard`` by declared roles.

Every member of a module list (a block) is gathered on its own while it is at work, the rest of the model once. An
expert stack is divided by expert when there are enough, so that an optimizer of matrices finds whole matrices on every
rank; any other tensor by its first axis. Models know nothing of this.
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

    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    for module in (*reversed(blocks), model):  # a block within a block first: the outer one takes what is left
        divided = fully_shard(module, mesh=ranks.mesh, shard_placement_fn=placement, reshard_after_forward=reshard)
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)  # else float32 asks for an operation that gloo lacks


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
