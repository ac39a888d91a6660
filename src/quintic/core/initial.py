"""Initial weights as a pure function of (seed, parameter name, element position).

No stream order, no device generator: one process, a sharded mesh and a later reader of the code all get
the same bits. Element i of a parameter (in row-major order) is element i of its own stream. Of a divided
parameter every process makes its own part, so that no process ever needs room for the whole model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quintic.core.counter_rng import Stream
from quintic.core.divided import region
from quintic.core.errors import ConfigError
from quintic.core.roles import Constant, declared_roles

__all__ = ["initialize_"]

_CHUNK = 1 << 20
_SEEDS = 2**63 - 1


@torch.no_grad()
def initialize_(model: nn.Module, seed: int | None) -> None:
    """Fill every parameter of a model, in place, by its declared distribution; those on the meta device have no values.

    Args:
        model: Every parameter must have a declared role (:func:`quintic.core.roles.declare`).
        seed: Any integer. None draws one from torch's default generator, so that ``torch.manual_seed`` governs the
            weights as it does those of ``torch.nn``.

    Raises:
        ConfigError: A parameter was declared without a distribution, or parameters are divided among ranks, which must
            agree on a seed, and there is none.
    """
    roles = declared_roles(model)
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta]
    if not parameters:
        return
    if seed is None:
        if any(hasattr(parameter, "to_local") for _, parameter in parameters):
            raise ConfigError("no seed for a model that is divided among ranks, which must agree on it: give a number")
        seed = int(torch.randint(_SEEDS, (), device="cpu"))
    for name, parameter in parameters:
        assert name in roles, f"parameter {name!r} has no declared role"
        init = roles[name].init
        if init is None:
            raise ConfigError(f"{name} was declared without a distribution of its initial values; declare it with one")
        if isinstance(init, Constant):
            parameter.fill_(init.value)
            continue
        here: Tensor = getattr(parameter, "to_local", lambda whole=parameter: whole)()
        flat = torch.empty(here.numel(), dtype=here.dtype, device="cpu")
        stream = Stream(seed, "weights", name)
        for place, first, length in _runs(parameter):
            for start in range(0, length, _CHUNK):
                count = min(_CHUNK, length - start)
                drawn = torch.from_numpy(stream.normal(first + start, count) * init.std)
                # In float64 too the weights are those of the model in float32.
                flat[place + start : place + start + count] = drawn.float()
        here.copy_(flat.view(here.shape))


def _runs(parameter: nn.Parameter) -> list[tuple[int, int, int]]:
    """(first element here, the same element in the whole parameter, length) of what lies here without a gap."""
    shape, (first, sizes) = parameter.shape, region(parameter)
    cut = [axis for axis in range(len(shape)) if sizes[axis] != shape[axis]]
    assert len(cut) <= 1, "parameters are divided along one axis"
    axis = cut[0] if cut else 0
    below = math.prod(shape[axis + 1 :])
    length = math.prod(sizes[axis:])
    return [
        (row * length, (row * shape[axis] + first[axis]) * below if cut else 0, length)
        for row in range(math.prod(shape[:axis]))
    ]
