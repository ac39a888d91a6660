"""Float64 where a device has it; the package's lowest floor on another default device."""

import pytest
import torch
from tests.devices import NARROW, meta_by_default, without_float64
from torch import nn

from quintic.core.initial import initialize_
from quintic.core.precision import accumulation_dtype, in_float64
from quintic.core.roles import Normal, Role, declare


def test_apples_gpus_have_no_float64():
    assert accumulation_dtype(torch.device("mps")) == torch.float32
    assert accumulation_dtype(torch.device("cuda")) == accumulation_dtype(torch.device("cpu")) == torch.float64


def test_float64_is_on_the_cpu_where_a_device_has_none(monkeypatch):
    moved = None
    with without_float64(monkeypatch):
        x = torch.ones(3, device=NARROW)
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        moved = in_float64(x)
    assert moved is not None and moved.device.type == "cpu" and moved.dtype == torch.float64
    assert in_float64(torch.ones(2)).tolist() == [1.0, 1.0]


def test_initial_weights_with_another_default_device():
    found = []
    for other in (False, True):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(3, 4))
        declare(model, "weight", Role.MATRIX, Normal(0.1))
        if other:
            with meta_by_default():
                initialize_(model, seed=1)
        else:
            initialize_(model, seed=1)
        found.append(model.weight.detach())
    assert torch.equal(*found) and found[0].abs().sum() > 0
