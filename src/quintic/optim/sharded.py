"""Muon on parameters that are divided among processes (DTensor).

Momentum and weight decay are elementwise and stay where they are. Msign is not: of a matrix that is divided every
process has some rows. There are two ways, with the same result:

    owner     one process owns the matrix. One all-to-all brings the owners their whole (Nesterov) momenta, each takes
              msign of its own, one all-to-all brings the rows of the updates back.
    gather    every process gathers every matrix, computes the same update and keeps its rows.

With w processes and S bytes of matrices, owners move 2 (w-1)/w S in all and take every msign once; gathering moves
(w-1) S and takes it w times. So owners never send more, and less from w = 3 on. Spectral weight decay is gathered
either way: its vectors, and the weights that they follow, are needed on every process. So is a matrix that is cut along
several mesh axes. A stack of experts that is divided by expert holds whole matrices and needs no communication.

Numbers over all parameters (is anything not finite, a norm, the promised change of the loss) are agreed on by a sum or
a maximum over the processes that hold different parts; replicas hold equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintic.optim.momentum import advance_

__all__ = [
    "DISTRIBUTED",
    "Divided",
    "Gathered",
    "agree_on_any",
    "assemble",
    "holds_whole_matrices",
    "local",
    "own_part",
    "scatter_",
    "sum_over_parts",
    "whole",
]


DISTRIBUTED = ("owner", "gather")
"""Ways to take msign of divided matrices."""


class Divided(NamedTuple):
    """A divided parameter that takes a step."""

    group: dict[str, Any]
    parameter: Tensor
    gradient: Tensor
    momentum: Tensor


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


def assemble(divided: list[Divided], bad: Tensor, distributed: str) -> list[Gathered | None]:
    """Advance the momenta of divided parameters where they lie, and put their Nesterov forms together.

    All processes call it with the same parameters in the same order.

    Args:
        divided: Gradients and momenta divided as their parameter is; momenta change in place unless the step is bad.
        bad: 0-d bool, equal on all processes.
        distributed: Name of :data:`DISTRIBUTED`.

    Returns:
        For each parameter what is to be updated here; None if another process does it.
    """
    directions = [_advance(each, bad) for each in divided]
    gathered: list[Gathered | None] = [None] * len(divided)
    for group, indices in _shares(divided, distributed):
        if group is None:
            for i in indices:
                settings, p = divided[i].group, divided[i].parameter
                weights = whole(local(p.detach()).to(directions[i].dtype), p) if _decay_needs_whole(settings) else None
                gathered[i] = _stand_in(settings, whole(directions[i], p), weights)
            continue
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        owners = _owners([divided[i].parameter for i in indices], world)
        sent = [[directions[i] for i, o in zip(indices, owners, strict=True) if o == r] for r in range(world)]
        mine = [i for i, o in zip(indices, owners, strict=True) if o == rank]
        rows = [[_part_shape(divided[i].parameter, r) for i in mine] for r in range(world)]
        received = _exchange(sent, rows, directions[indices[0]], group)
        for number, i in enumerate(mine):
            parts = [received[r][number] for r in range(world)]
            gathered[i] = _stand_in(divided[i].group, torch.cat(parts, _cut(divided[i].parameter)[1]))
    return gathered


def scatter_(divided: list[Divided], results: list[Tensor | None], bad: Tensor, distributed: str) -> None:
    """Give divided parameters their rows of what a step has made of the weights of :func:`assemble`."""
    for group, indices in _shares(divided, distributed):
        if group is None:
            for i in indices:
                result = results[i]
                assert result is not None
                _apply(*divided[i][:2], own_part(result, divided[i].parameter), bad)
            continue
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        owners = _owners([divided[i].parameter for i in indices], world)
        mine = [(divided[i].parameter, results[i]) for i, o in zip(indices, owners, strict=True) if o == rank]
        sent: list[list[Tensor]] = [[] for _ in range(world)]
        for p, result in mine:
            assert result is not None
            axis = _cut(p)[1]
            lengths = [_part_shape(p, r)[axis] for r in range(world)]
            for r, part in enumerate(result.split(lengths, axis)):
                sent[r].append(part)
        theirs = [[i for i, o in zip(indices, owners, strict=True) if o == r] for r in range(world)]
        shapes = [[_part_shape(divided[i].parameter, rank) for i in each] for each in theirs]
        like = local(divided[indices[0]].momentum)
        for each, parts in zip(theirs, _exchange(sent, shapes, like, group), strict=True):
            for i, rows in zip(each, parts, strict=True):
                _apply(*divided[i][:2], rows, bad)


def _advance(divided: Divided, bad: Tensor) -> Tensor:
    """The local part of the direction whose msign is taken."""
    momentum = local(divided.momentum)
    direction = local(divided.gradient).to(momentum.dtype, copy=True).masked_fill_(bad, 0.0)
    advance_(divided.group, [momentum], [direction], (~bad).to(momentum.dtype))
    return direction


def _stand_in(group: dict[str, Any], direction: Tensor, weights: Tensor | None = None) -> Gathered:
    settings = {"momentum": 0.0, "momentum_form": "average", "nesterov": False, "maximize": False}
    decay = 0.0 if weights is None else group["weight_decay"]
    weights = torch.zeros_like(direction) if weights is None else weights
    return Gathered({**group, **settings, "weight_decay": decay}, weights, direction, torch.zeros_like(direction))


def _apply(group: dict[str, Any], p: Tensor, rows: Tensor, bad: Tensor) -> None:
    """Write the local rows of a result: new weights with spectral decay, else an update."""
    own = local(p.detach())
    if _decay_needs_whole(group):
        own.copy_(rows)
        return
    keep = (~bad).to(rows.dtype)
    target = own.to(rows.dtype)  # half precision is rounded once
    target = target.mul_(1.0 - keep * group["lr"] * group["weight_decay"]).add_(rows)
    if target is not own:
        own.copy_(target)


def _shares(divided: list[Divided], distributed: str) -> Iterator[tuple[Any, list[int]]]:
    """Indices of the parameters that travel together and the processes among which; None for those gathered."""
    together: dict[Any, tuple[Any, list[int]]] = {}
    for i, (group, p, _, momentum) in enumerate(divided):
        assert isinstance(p, DTensor)
        cuts = [axis for axis, placement in enumerate(p.placements) if isinstance(placement, Shard)]
        if distributed == "gather" or _decay_needs_whole(group) or len(cuts) != 1:
            among, key = None, None
        else:
            among = p.device_mesh.get_group(cuts[0])
            key = (among.group_name, p.device_mesh.device_type, momentum.dtype)
        together.setdefault(key, (among, []))[1].append(i)
    yield from together.values()


def _owners(parameters: list[Tensor], world: int) -> list[int]:
    """An owner for each: the largest first, to whom has least to compute so far."""
    work = [p.numel() * min(p.shape[-2:]) for p in parameters]
    owners, loads = [0] * len(work), [0] * world
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += work[i]
    return owners


def _cut(p: Tensor) -> tuple[int, int]:
    """(mesh axis, tensor axis) of the one cut of a parameter."""
    assert isinstance(p, DTensor)
    return next((axis, at.dim % p.ndim) for axis, at in enumerate(p.placements) if isinstance(at, Shard))


def _part_shape(p: Tensor, rank: int) -> tuple[int, ...]:
    """Shape of the part of a parameter that a process of its group has: as torch.chunk cuts, perhaps empty."""
    assert isinstance(p, DTensor)
    mesh_axis, axis = _cut(p)
    length = p.shape[axis]
    each = -(-length // p.device_mesh.size(mesh_axis))
    return (*p.shape[:axis], min(each, max(0, length - rank * each)), *p.shape[axis + 1 :])


def _exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor, group: Any
) -> list[list[Tensor]]:
    """One all-to-all: to each process the tensors of its list, from each tensors of the shapes of its list."""
    buffer = torch.cat([like.new_empty(0), *(t.reshape(-1) for each in sent for t in each)])
    out = [sum(t.numel() for t in each) for each in sent]
    sizes = [[math.prod(shape) for shape in each] for each in shapes]
    received = buffer.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, buffer, [sum(each) for each in sizes], out, group=group)
    flat = iter(received.split([size for each in sizes for size in each]))
    return [[next(flat).view(shape) for shape in each] for each in shapes]


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
