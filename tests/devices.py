"""Devices that this machine has not: another default, and one without float64 that only knows shapes."""

import contextlib

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quintic.core import precision

NARROW = torch.device("lazy:0")
"""The stand-in's name: torch knows it, and no code here does."""


@contextlib.contextmanager
def meta_by_default():
    """What does not say where it lies is on the meta device, which holds nothing, so that its use with others fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.device == NARROW and t.dtype == torch.float64:
                raise TypeError(f"no float64 here: {func}")
        return out


@contextlib.contextmanager
def without_float64(monkeypatch):
    """Tensors on the device NARROW have a shape and no values, and float64 is refused there as on Apple's GPUs.

    The block ends early where values are asked for.
    """
    monkeypatch.setattr(precision, "_WITHOUT_FLOAT64", frozenset({"mps", NARROW.type}))
    with contextlib.suppress(DataDependentOutputException), FakeTensorMode(allow_non_fake_inputs=True), _NoFloat64():
        yield
