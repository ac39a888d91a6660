"""State of a parameter under Muon that needs more than zeros: checked when it is loaded, and spectral decay's vectors.

The vectors that spectral decay follows (:mod:`quintic.optim.decay`) are (matrices, shorter side, rank) of each part of
a parameter. Of a stack that is divided by expert each process has those of its own experts, and they are divided as the
stack is, by their first axis: (experts, the rest, rank).
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from quintic.core import CheckpointError
from quintic.optim.decay import start_top_space, top_space_shape
from quintic.optim.groups import matrices_in, name_of
from quintic.optim.sharded import holds_whole_matrices, local
from quintic.optim.split import Part

__all__ = ["fit_state", "top_space_of"]

_NAME = "top_space"
_OF_ADAMW = ("step", "exp_avg", "exp_avg_sq")


# It takes the state and not the parameter: compiled by torch 2.13, a look-up by parameter may find another's state.
def top_space_of(group: dict[str, Any], state: dict[str, Tensor], index: int, part: Part) -> Tensor | None:
    """The vectors of a part, those that lie here; started when first needed, or when the rank was changed."""
    if group["decay"] != "spectral" or not group["weight_decay"] or min(part.n, part.m) == 1:
        return None  # a row or a column has one singular value, so that all decays are one
    name, matrices = _name(index), part[1:]
    shape = top_space_shape(*matrices, group["decay_rank"])
    if name not in state or local(state[name]).numel() != math.prod(shape):
        momentum = state["momentum_buffer"]
        started = start_top_space(part.tensor.to(momentum.dtype).reshape(matrices), group["decay_rank"])
        if _divided_by_expert(momentum, group["layout"]):
            started = started.reshape(len(local(momentum)), -1, shape[2])
            whole = (len(momentum), *started.shape[1:])
            started = DTensor.from_local(
                started, momentum.device_mesh, momentum.placements, run_check=False,
                shape=torch.Size(whole), stride=(whole[1] * whole[2], whole[2], 1),
            )  # fmt: skip
        state[name] = started
    return local(state[name]).view(shape)


def fit_state(group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
    """State of a parameter that comes from elsewhere, shaped and divided as this one keeps it.

    Args:
        group: Of the parameter.
        p: The parameter.
        name: Of the state.
        value: Whole, or divided as here.

    Raises:
        CheckpointError: It is of a parameter of another shape, or of one that was updated by another algorithm.
    """
    if (name in _OF_ADAMW) != (group["algorithm"] == "adamw"):
        raise CheckpointError(
            f"{name_of(group, p)} is updated by {group['algorithm']} here and has {name} in the state, which is of "
            "another algorithm; an optimizer cannot be changed within a run. Start a new one from its weights"
        )
    if name == "step":
        return value
    shape, vectors = tuple(p.shape), False
    if name.startswith(_NAME) and value.ndim == 3:
        for i, part in enumerate(matrices_in(group, torch.empty(shape, device="meta"))):
            if name == _name(i):
                shape, vectors = top_space_shape(*part[1:], value.shape[2]), True
                break
    fits = value.numel() == math.prod(shape) if vectors else value.shape == shape
    if not fits:
        raise CheckpointError(
            f"{name} of {name_of(group, p)} has shape {tuple(value.shape)} in the state and {shape} here; "
            "this state belongs to another model"
        )
    if not vectors or isinstance(value, DTensor):
        return value
    if not _divided_by_expert(p, group["layout"]):
        return value.reshape(shape)
    value = value.reshape(len(p), -1, shape[2])
    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def _divided_by_expert(tensor: Tensor, layout: str | None) -> TypeGuard[DTensor]:
    return isinstance(tensor, DTensor) and holds_whole_matrices(tensor, layout)


def _name(index: int) -> str:
    """Name of the state of one part of a parameter."""
    return f"{_NAME}_{index}" if index else _NAME
