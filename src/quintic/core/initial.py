"""Initial weights as a pure function of (seed, parameter name, element position).

No stream order, no device generator: one process, a sharded mesh and a later reader of the code all get
the same bits. Element i of a parameter (in row-major order) is element i of its own stream.
"""

from __future__ import annotations

import torch
from torch import nn

from quintic.core.counter_rng import Stream
from quintic.core.roles import Constant, declared_roles

__all__ = ["initialize_"]

_CHUNK = 1 << 20


@torch.no_grad()
def initialize_(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a model, in place, by its declared distribution.

    Args:
        model: Every parameter must have a declared role (:func:`quintic.core.roles.declare`).
        seed: Any integer.
    """
    roles = declared_roles(model)
    for name, parameter in model.named_parameters():
        assert name in roles, f"parameter {name!r} has no declared role"
        init = roles[name].init
        if isinstance(init, Constant):
            parameter.fill_(init.value)
            continue
        stream = Stream(seed, "weights", name)
        flat = torch.empty(parameter.numel(), dtype=parameter.dtype)
        for start in range(0, flat.numel(), _CHUNK):
            count = min(_CHUNK, flat.numel() - start)
            flat[start : start + count] = torch.from_numpy(stream.normal(start, count) * init.std)
        parameter.copy_(flat.view(parameter.shape))
