"""Muon on parameters that are divided among processes (DTensor).

Momentum and weight decay are elementwise and stay where they are. Msign is not: a matrix of which every process has
some rows is gathered once per step (its Nesterov momentum, in float32), every process computes the same update and
keeps its rows. A stack of experts that is divided by expert holds whole matrices everywhere and needs no communication.
So Muon sends one gather of the 2-D matrices beyond what AdamW does, which works elementwise.

Numbers over all parameters (is anything not finite, a norm, the promised change of the loss) are agreed on by a sum or
a maximum over the processes that hold different parts; replicas hold equal ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

__all__ = [
    "Gathered",
    "agree_on_any",
    "gather",
    "holds_whole_matrices",
    "local",
    "own_part",
    "scatter_",
    "sum_over_parts",
    "whole",
]


class Gathered(NamedTuple):
    """Stand-ins for a divided parameter, whole on every process, that a step of whole matrices can work on."""

    group: dict[str, Any]
    """Settings for these: the momentum is in the gradient already."""
    weights: Tensor
    """Zeros, which the step turns into the update; the weights themselves where their decay needs them whole."""
    gradient: Tensor
    momentum: Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here; itself if it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, pattern: Tensor) -> Tensor:
    """Put together a tensor of which this is the local part, divided as the pattern is; one gather."""
    if not isinstance(pattern, DTensor):
        return part
    spread = DTensor.from_local(
        part, pattern.device_mesh, pattern.placements, run_check=False, shape=pattern.shape, stride=pattern.stride()
    )
    return spread.full_tensor()


def own_part(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The part of a whole tensor that lies here if it is divided as the pattern is; no communication."""
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None).to_local()


def gather(group: dict[str, Any], p: Tensor, gradient: Tensor, momentum: Tensor, bad: Tensor) -> Gathered:
    """Advance the momentum of a divided parameter where it lies, and put its Nesterov form together.

    Args:
        group: Settings of the parameter.
        p: The parameter.
        gradient: Divided as it is.
        momentum: Likewise; changed in place unless the step is bad.
        bad: 0-d bool, equal on all processes.
    """
    own_momentum, mu = local(momentum), group["momentum"]
    g = local(gradient).to(own_momentum.dtype, copy=True)
    if group["maximize"]:
        g.neg_()
    g.masked_fill_(bad, 0.0)
    keep = (~bad).to(g.dtype)
    own_momentum.mul_(1.0 - keep * (1.0 - mu)).add_(g, alpha=1.0 - mu)
    direction = whole(g.lerp_(own_momentum, mu) if group["nesterov"] else own_momentum, p)
    spectral = _decay_needs_whole(group)
    weights = whole(local(p.detach()).to(g.dtype), p) if spectral else torch.zeros_like(direction)
    settings = {"momentum": 0.0, "nesterov": False, "maximize": False}
    decay = group["weight_decay"] if spectral else 0.0
    return Gathered({**group, **settings, "weight_decay": decay}, weights, direction, torch.zeros_like(direction))


def scatter_(group: dict[str, Any], p: Tensor, result: Tensor, bad: Tensor) -> None:
    """Give a divided parameter its rows of the result that a step has made of :class:`Gathered` weights."""
    own, rows = local(p.detach()), own_part(result, p)
    if _decay_needs_whole(group):
        own.copy_(rows)
        return
    keep = (~bad).to(rows.dtype)
    target = own.to(rows.dtype)  # half precision is rounded once
    target = target.mul_(1.0 - keep * group["lr"] * group["weight_decay"]).add_(rows)
    if target is not own:
        own.copy_(target)


def _decay_needs_whole(group: dict[str, Any]) -> bool:
    return group["decay"] == "spectral" and bool(group["weight_decay"])


def holds_whole_matrices(tensor: Tensor) -> bool:
    """Whether the local part of a stack of matrices is a stack of whole ones."""
    if not isinstance(tensor, DTensor):
        return True
    return tensor.ndim == 3 and all(not isinstance(p, Shard) or p.dim == 0 for p in tensor.placements)


def agree_on_any(flag: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """A 0-d bool that is true everywhere if it is true somewhere; unchanged if no tensor is divided."""
    for group in _part_groups(tensors):
        number = flag.to(torch.float32)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        flag = number > 0
    return flag


def sum_over_parts(values: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Sum over the processes that hold different parts of these tensors; unchanged if none is divided."""
    for group in _part_groups(tensors):
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


def _part_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """Groups of processes along the mesh axes by which the first divided tensor is cut."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            axes = [axis for axis, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
            return [mesh.get_group(axis) for axis in axes]
    return []
