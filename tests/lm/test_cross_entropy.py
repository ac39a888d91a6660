"""The chunked cross-entropy against torch's own, in value, gradients and memory."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.lm import cross_entropy as module
from quintic.lm.cross_entropy import linear_cross_entropy


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@given(
    tokens=st.integers(1, 40), width=st.integers(1, 9), vocabulary=st.integers(2, 30), chunk=st.integers(1, 200),
    seed=st.integers(0, 99), ignored=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_value_and_gradients_are_torch_s(tokens, width, vocabulary, chunk, seed, ignored):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=g).mul_(3).requires_grad_()
    w = torch.randn(vocabulary, width, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < ignored] = -1
    expected = F.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction="sum")
    expected_grads = torch.autograd.grad(2.5 * expected, (x, w))
    with mock.patch.multiple(module, _CHUNK_ELEMENTS={"cpu": chunk}, _LEAST_ROWS=1):
        found = linear_cross_entropy(x, w, targets)
        grads = torch.autograd.grad(2.5 * found, (x, w))
        for one, other in zip((found, *grads), (expected, *expected_grads), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
        with torch.no_grad():
            assert linear_cross_entropy(x, w, targets) == found


def test_any_mark_of_tokens_that_are_not_predicted():
    x, w = torch.randn(6, 3), torch.randn(5, 3)
    targets = torch.tensor([0, -100, 4, 2, -100, 1])
    expected = F.cross_entropy(x @ w.t(), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, w, targets, ignore=-100), expected)


def test_bfloat16_weights_are_summed_up_in_float32():
    """Many chunks, each a small part of the sums: in bfloat16 they would be lost."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g).bfloat16().requires_grad_() for n in (3000, 8))
    targets = torch.randint(0, 8, (3000,), generator=g)
    expected = F.cross_entropy(x.double() @ w.double().t(), targets, reduction="sum")
    grads = torch.autograd.grad(expected, (x, w))
    with mock.patch.multiple(module, _CHUNK_ELEMENTS={"cpu": 8}, _LEAST_ROWS=10):
        found = linear_cross_entropy(x, w, targets)
        found_grads = torch.autograd.grad(found, (x, w))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=2e-3)
    for one, other in zip(found_grads, grads, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).float().norm() < 0.01 * other.float().norm()


def test_huge_logits_do_not_overflow():
    x, w = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(x, w, torch.tensor([0])) == 0.0
    assert linear_cross_entropy(x, w, torch.tensor([1])) == 2e4


def test_autocast_and_frozen_weights():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 16, generator=g, requires_grad=True)
    w = torch.randn(40, 16, generator=g)
    targets = torch.randint(0, 40, (2, 50), generator=g)
    exact = linear_cross_entropy(x, w, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = linear_cross_entropy(x, w, targets)
    assert rough.dtype == torch.float32 and rough != exact
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)
    rough.backward()
    assert x.grad.dtype == torch.float32 and torch.allclose(x.grad, torch.autograd.grad(exact, x)[0], atol=0.05)


def test_no_tensor_is_as_large_as_all_logits():
    """Largest storage that autograd or the forward pass makes, watched by torch's dispatcher."""
    tokens, vocabulary = 1024, 4096
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    x, w = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    with Watch():
        linear_cross_entropy(x, w, torch.zeros(tokens, dtype=torch.int64)).backward()
    assert largest <= 4 * module._LEAST_ROWS * vocabulary < 4 * tokens * vocabulary / 7


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_products_are_those_that_are_asked_for(no_gradients):
    """One for the logits, one for each gradient: a head that can be trained costs no more where nothing is trained."""

    def products(*, x_trained, w_trained):
        x, w = torch.randn(300, 8, requires_grad=x_trained), torch.randn(2048, 8, requires_grad=w_trained)
        with Called() as called, mock.patch.multiple(module, _CHUNK_ELEMENTS={"cpu": 1}, _LEAST_ROWS=100):
            linear_cross_entropy(x, w, torch.zeros(300, dtype=torch.int64))
        return sum(name in ("aten::mm", "aten::matmul", "aten::addmm_") for name in called.names) / 3  # chunks

    assert products(x_trained=True, w_trained=True) == 3
    assert products(x_trained=False, w_trained=True) == products(x_trained=True, w_trained=False) == 2
    with no_gradients():
        assert products(x_trained=False, w_trained=False) == 1
        assert products(x_trained=False, w_trained=True) == products(x_trained=True, w_trained=True) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert products(x_trained=False, w_trained=True) == 1
