"""Parameter roles: what a parameter *is*, declared by the module that creates it.

A matrix that multiplies dense vectors, a stack of such matrices (experts), a table of rows (embedding),
the output head, a vector of gains. The optimizer routes by role (Muon for matrices, AdamW for the rest),
the initial weights are drawn by role, and sharding follows it. Nothing is guessed from a name or a shape.

Roles live on the *module*, under the parameter's local name, so they survive ``deepcopy``, ``.to()``,
meta-device construction and sharding wrappers that replace the parameter object.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Constant", "Init", "Normal", "ParameterRole", "Role", "declare", "declared_roles"]

_ATTRIBUTE = "_quintic_roles"


class Role(enum.Enum):
    """What a parameter is to the mathematics, not where it sits."""

    MATRIX = "matrix"
    """(out, in): multiplies dense vectors."""
    EXPERT_STACK = "expert stack"
    """(experts, out, in): one matrix per expert."""
    ROUTER = "router"
    """(experts, in): a matrix whose rows score experts."""
    EMBEDDING = "embedding"
    """(vocabulary, width): rows picked by index."""
    HEAD = "head"
    """(vocabulary, width): the output layer."""
    VECTOR = "vector"
    """Gains, biases and scalars."""


@dataclass(frozen=True)
class Normal:
    """Initial values from a normal distribution with mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initial values all equal."""

    value: float


Init = Normal | Constant


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is and how it starts."""

    role: Role
    init: Init
    row_blocks: int = 1
    """How many matrices of equal height are stacked along the rows, e.g. 2 for a fused gate and up
    projection. An optimizer of matrices treats each block as a matrix of its own."""


def declare(module: nn.Module, name: str, role: Role, init: Init, *, row_blocks: int = 1) -> None:
    """Declare the role of ``module.name``, a parameter the module has just created.

    Args:
        module: The module that owns the parameter directly.
        name: The attribute's name, without dots.
        role: What it is.
        init: The distribution of its initial values.
        row_blocks: Number of equal matrices stacked along the last but one axis.
    """
    parameter = module._parameters.get(name)
    assert parameter is not None, f"{type(module).__name__} has no parameter {name!r}"
    assert row_blocks == 1 or parameter.shape[-2] % row_blocks == 0, f"{name}: rows do not split in {row_blocks}"
    module.__dict__.setdefault(_ATTRIBUTE, {})[name] = ParameterRole(role, init, row_blocks)


def declared_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """Return {qualified parameter name: role} of every declared parameter, in ``named_parameters`` order."""
    found: dict[str, ParameterRole] = {}
    for prefix, module in model.named_modules():
        for name, role in module.__dict__.get(_ATTRIBUTE, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = role
    return {name: found[name] for name, _ in model.named_parameters() if name in found}
