"""The norm of many tensors: few operations, no copies, float64's result."""

import pytest
import torch
from tests.optim.toy import randn
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.optim import global_norm


class Counted(TorchDispatchMode):
    """Operations, and the largest tensor that one of them has made anew."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tensors_cost_few_operations_and_no_copies(device, dtype):
    tensors = [torch.ones(8, 30, dtype=dtype, device=device) for _ in range(100)]
    with Counted(tensors) as counted:
        norm = global_norm(tensors)
    assert counted.operations < 30 and counted.largest <= 100
    assert norm.is_meta or float(norm) == pytest.approx(24000**0.5, rel=1e-7)


def test_large_tensors_are_summed_accurately():
    """A float32 sum of these squares by torch on a CPU is 2e-4 off."""
    x = randn(2**23)
    assert float(global_norm([x, x.view(2**11, 2**12)])) == pytest.approx(float(x.double().norm()) * 2**0.5, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-44, -22, -16, -9, 0, 18, 30])
def test_small_and_large_numbers_side_by_side(exponent, dtype):
    """Where squares are lost, and where they would be, without the ones that keep the total in range, or with them."""
    unit = torch.tensor(10.0**exponent, dtype=dtype)
    x = randn(50, seed=1, dtype=dtype) * unit
    for others in ([], [torch.zeros(3)], [torch.ones(2)], [torch.ones(2, dtype=torch.float64)]):
        exact = torch.cat([x.double(), *(t.double() for t in others)])
        exact = exact / exact.abs().max(), exact.abs().max()
        expected = float(exact[0].norm() * exact[1])
        assert float(global_norm([x, *others])) == pytest.approx(expected, rel=2e-7)


def test_the_same_numbers_give_the_same_bits():
    tensors = [randn(300, 200, seed=i) for i in range(5)]
    assert len({float(global_norm([t.clone() for t in tensors])) for _ in range(5)}) == 1
