"""Muon on parameters that are divided among processes (DTensor).

Momentum and weight decay are elementwise and stay where they are. Msign is not: of a matrix that is divided every
process has some rows. There are two ways, with the same result:

    owner     one process owns the matrix. One all-to-all brings the owners their whole (Nesterov) momenta, each takes
              msign of its own, one all-to-all brings the rows of the updates back.
    gather    every process gathers every matrix, computes the same update and keeps its rows.

With w processes and S bytes of matrices, owners move 2 (w-1)/w S in all and take every msign once; gathering moves
(w-1) S and takes it w times. So owners never send more, and less from w = 3 on. Spectral weight decay is gathered
either way: its vectors, and the weights that they follow, are needed on every process. So is a matrix that is cut along
several mesh axes, as by FSDP over tensor parallelism. A stack of experts that is divided by expert holds whole matrices
and needs no communication.

Numbers over all parameters are agreed on among processes. A sum (a squared norm, the promised change of the loss) takes
each tensor over the mesh axes along which it is cut and no others, so that replicas, which are equal, count once. A
flag (is anything not finite) is shared along every axis of every mesh. Tensors may lie on several meshes, such as
experts on one axis and the rest on all, as long as these are of one set of processes and each process holds a part of
every tensor. The stages of a pipeline hold different tensors: to this module each is a model of its own.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from quintic.core import ConfigError
from quintic.optim.momentum import advance_

__all__ = [
    "DISTRIBUTED",
    "Divided",
    "Gathered",
    "agree_on_any",
    "assemble",
    "check_layout",
    "holds_whole_matrices",
    "local",
    "own",
    "own_part",
    "scatter_",
    "settle_gradient_",
    "settled",
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


def own(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies here, to be changed in place; itself, without history, if it is not divided."""
    return local(parameter).detach()


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


def assemble(divided: list[Divided], keep: Tensor | float, distributed: str) -> list[Gathered | None]:
    """Advance the momenta of divided parameters where they lie, and put their Nesterov forms together.

    All processes call it with the same parameters in the same order.

    Args:
        divided: Gradients and momenta divided as their parameter is; momenta change in place.
        keep: 1, or a 0-d tensor of 1 or 0, which turns this into no step; equal on all processes.
        distributed: Name of :data:`DISTRIBUTED`.

    Returns:
        For each parameter what is to be updated here; None if another process does it.
    """
    directions = _advance(divided, keep)
    gathered: list[Gathered | None] = [None] * len(divided)
    for group, indices in _shares(divided, distributed):
        if group is None:
            for i in indices:
                settings, p = divided[i].group, divided[i].parameter
                weights = whole(own(p).to(directions[i].dtype), p) if _decay_needs_whole(settings) else None
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


def scatter_(divided: list[Divided], results: list[Tensor | None], keep: Tensor | float, distributed: str) -> None:
    """Give divided parameters their rows of what a step has made of the weights of :func:`assemble`."""
    rows: dict[int, Tensor] = {}
    for group, indices in _shares(divided, distributed):
        if group is None:
            for i in indices:
                result = results[i]
                assert result is not None
                rows[i] = own_part(result, divided[i].parameter)
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
            rows.update(zip(each, parts, strict=True))
    _apply(divided, rows, keep)


def _advance(divided: list[Divided], keep: Tensor | float) -> list[Tensor]:
    """The local parts of the directions whose msign is taken."""
    directions = [torch.empty_like(local(each.momentum)) for each in divided]
    for group, indices in _alike(divided):
        momenta = [local(divided[i].momentum) for i in indices]
        gradients = [local(divided[i].gradient) for i in indices]
        views = [directions[i] for i in indices]
        if isinstance(keep, Tensor):
            torch._foreach_copy_(views, gradients)
            for view in views:
                view.masked_fill_(keep == 0.0, 0.0)
            advance_(group, momenta, views, keep.to(views[0].device, views[0].dtype))
        else:
            advance_(group, momenta, gradients, keep, views)
    return directions


def _alike(divided: list[Divided]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Indices of the parameters that one call can work on, and their settings."""
    together: dict[Any, list[int]] = {}
    for i, each in enumerate(divided):
        together.setdefault((id(each.group), each.momentum.dtype, each.momentum.device), []).append(i)
    for indices in together.values():
        yield divided[indices[0]].group, indices


def _stand_in(group: dict[str, Any], direction: Tensor, weights: Tensor | None = None) -> Gathered:
    settings = {"momentum": 0.0, "momentum_form": "average", "nesterov": False, "maximize": False}
    decay = 0.0 if weights is None else group["weight_decay"]
    weights = torch.zeros_like(direction) if weights is None else weights
    return Gathered({**group, **settings, "weight_decay": decay}, weights, direction, torch.zeros_like(direction))


def _apply(divided: list[Divided], rows: dict[int, Tensor], keep: Tensor | float) -> None:
    """Write the local rows of the results: new weights with spectral decay, else updates."""
    for group, indices in _alike(divided):
        found, parts = [rows[i] for i in indices], [own(divided[i].parameter) for i in indices]
        if _decay_needs_whole(group):
            torch._foreach_copy_(parts, found)
            continue
        targets = [p.to(row.dtype) for p, row in zip(parts, found, strict=True)]  # half precision is rounded once
        if group["weight_decay"]:
            now = keep.to(found[0].device, found[0].dtype) if isinstance(keep, Tensor) else keep
            torch._foreach_mul_(targets, 1.0 - now * group["lr"] * group["weight_decay"])
        torch._foreach_add_(targets, found)
        for p, target in zip(parts, targets, strict=True):
            if target is not p:
                p.copy_(target)


def _shares(divided: list[Divided], distributed: str) -> Iterator[tuple[Any, list[int]]]:
    """Indices of the parameters that travel together and the processes among which; None for those gathered."""
    together: dict[Any, tuple[Any, list[int]]] = {}
    for i, (group, p, _, momentum) in enumerate(divided):
        assert isinstance(p, DTensor)
        cuts = _cut_axes(p)
        strided = any(not isinstance(p.placements[axis], Shard) for axis in cuts)  # its parts are not rows in order
        if distributed == "gather" or _decay_needs_whole(group) or strided or len(cuts) != 1:
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
    axis = _cut_axes(p)[0]
    at = p.placements[axis]
    assert isinstance(at, Shard)
    return axis, at.dim % p.ndim


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


def holds_whole_matrices(tensor: Tensor, layout: str | None = None) -> bool:
    """Whether the local part of a parameter, or its momentum, is a stack of whole matrices.

    Args:
        tensor: Divided or not.
        layout: How it is read, see :func:`quintic.optim.split.parts_of`; a convolution of three axes is no stack.
    """
    if not isinstance(tensor, DTensor):
        return True
    cuts = (tensor.placements[axis] for axis in _cut_axes(tensor))
    return layout in (None, "stack") and tensor.ndim == 3 and all(getattr(at, "dim", None) in (0, -3) for at in cuts)


def check_layout(tensor: Tensor, name: str) -> None:
    """Raise ConfigError for a divided parameter that a step cannot work on."""
    if not isinstance(tensor, DTensor):
        return
    if tensor.device_mesh.get_coordinate() is None:
        raise ConfigError(
            f"{name} lies on a mesh of other processes than this one; expected a part of every parameter on every "
            "process that takes the step: make the mesh an axis of one of all (init_device_mesh, then mesh['ep'])"
        )
    if any(map(_is_pending, tensor.placements)):
        raise ConfigError(
            f"{name} is a sum whose terms lie on several processes (placements {tensor.placements}); expected weights "
            "that are divided or replicated: redistribute them with Shard or Replicate"
        )


def settled(tensor: Tensor) -> Tensor:
    """A divided tensor whose pending sums (Partial) have been taken; itself if it has none."""
    if not isinstance(tensor, DTensor) or not any(map(_is_pending, tensor.placements)):
        return tensor
    return tensor.redistribute(placements=[Replicate() if _is_pending(at) else at for at in tensor.placements])


def settle_gradient_(p: Tensor) -> None:
    """Replace a gradient that is laid out unlike its parameter by the same one laid out like it, in ``p.grad``.

    Sequence parallelism leaves such gradients: of a gain that every process has, each has the part that comes from its
    own tokens, and the sum is pending (Partial). The norm of a sum is not known from those of its terms.
    """
    g = p.grad
    if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
        p.grad = g.redistribute(placements=p.placements)


def agree_on_any(flags: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Bools that are true everywhere if they are true somewhere; unchanged if no tensor is divided.

    Args:
        flags: Any shape, the same on all processes.
        tensors: All that the flags are about. Every process that has a part or a replica of one gets the answer.
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
    for group in groups.values():
        numbers = flags.to(torch.float32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
        flags = numbers > 0
    return flags


def sum_over_parts(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Sum of a number of each tensor, over all of its parts; one exchange for each group of processes.

    Args:
        values: Of the part that lies here, 0-d, one for each tensor, all of one dtype and on one device.
        tensors: Divided or whole; the number of a whole one is taken as it is.

    Returns:
        0-d, the same on all processes.

    Raises:
        ConfigError: The tensors lie on meshes of different sets of processes.
    """
    _check_meshes(tensors)
    groups: dict[str, Any] = {}
    together: dict[tuple[str, ...], list[Tensor]] = {}  # by the groups among which their parts lie
    for value, tensor in zip(values, tensors, strict=True):
        among = [tensor.device_mesh.get_group(i) for i in _cut_axes(tensor)] if isinstance(tensor, DTensor) else []
        groups.update((group.group_name, group) for group in among)
        together.setdefault(tuple(group.group_name for group in among), []).append(value)
    sums = {names: torch.stack(each).sum() for names, each in together.items()}
    for name, group in groups.items():
        concerned = [names for names in sums if name in names]
        packed = torch.stack([sums[names] for names in concerned])
        dist.all_reduce(packed, group=group)
        sums.update(zip(concerned, packed.unbind(), strict=True))
    return torch.stack(list(sums.values())).sum()


def _check_meshes(tensors: Sequence[Tensor]) -> None:
    """A process that has no part of a tensor could not know its sum."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    members = {mesh: sorted(mesh._get_root_mesh().mesh.flatten().tolist()) for mesh in meshes}
    if not members:
        return
    first, *others = members
    for mesh in others:
        if members[mesh] != members[first]:
            raise ConfigError(
                f"tensors lie on meshes of different processes: {first} of ranks {members[first]} and {mesh} of ranks "
                f"{members[mesh]}, so that no sum over all is known. Make both axes of one mesh of all processes "
                "(init_device_mesh, then mesh['dp'], mesh['ep']), or call this for each mesh apart"
            )


def _cut_axes(tensor: DTensor) -> list[int]:
    """Mesh axes along which a tensor is cut.

    FSDP over tensor parallelism cuts rows by ``_StridedShard``, which is no ``Shard`` and denies ``is_shard()``.
    """
    return [axis for axis, at in enumerate(tensor.placements) if not at.is_replicate() and not _is_pending(at)]


def _is_pending(placement: Placement) -> bool:
    return placement.is_partial()
