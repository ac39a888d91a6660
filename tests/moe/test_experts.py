"""Routed experts against a per-token loop in float64, finite differences and a dense sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from quintic.core.initial import initialize_
from quintic.moe.experts import Experts, SwiGLU, routed_experts


def slow(x, ids, gates, gate_up, down):
    rows = []
    for n in range(x.shape[0]):
        y = torch.zeros_like(x[n])
        for j, e in enumerate(ids[n].tolist()):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            y = y + gates[n, j] * (down[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def inputs(n, d, f, experts, k, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True)  # noqa: E731
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(n)]) if n else torch.empty(0, k).long()
    return make(n, d), ids, make(n, k), make(experts, 2 * f, d), make(experts, d, f)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 6), st.data())
def test_values_and_gradients_equal_the_loop(n, d, f, experts, data):
    k = data.draw(st.integers(1, experts))
    x, ids, gates, gate_up, down = inputs(n, d, f, experts, k, seed=n * 100 + d)
    tensors = (x, gates, gate_up, down)
    weight = torch.randn(n, d, dtype=torch.float64)
    fast, plain = (function(x, ids, gates, gate_up, down) for function in (routed_experts, slow))
    torch.testing.assert_close(fast, plain)
    if n:
        found, expected = (torch.autograd.grad((y * weight).sum(), tensors) for y in (fast, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_finite_differences():
    x, ids, gates, gate_up, down = inputs(6, 5, 3, 4, 2)
    assert torch.autograd.gradcheck(lambda *a: routed_experts(a[0], ids, *a[1:]), (x, gates, gate_up, down))


def test_an_expert_without_tokens_gets_an_exact_zero_gradient():
    x, _, gates, gate_up, down = inputs(6, 4, 3, 5, 2)
    ids = torch.tensor([[0, 1]] * 6)
    routed_experts(x, ids, gates, gate_up, down).sum().backward()  # also: a gradient of stride 0 comes in
    for weight in (gate_up, down):
        assert weight.grad[2:].eq(0).all() and weight.grad[:2].abs().sum() > 0


def test_all_experts_with_unit_gates_are_one_wide_dense_network():
    x, _, _, gate_up, down = inputs(7, 6, 4, 3, 3)
    ids = torch.arange(3).expand(7, 3)
    dense = SwiGLU(6, 12).double()
    with torch.no_grad():
        gate, up = gate_up.chunk(2, dim=1)
        dense.gate_up.copy_(torch.cat([gate.reshape(12, 6), up.reshape(12, 6)]))
        dense.down.copy_(down.transpose(0, 1).reshape(6, 12))
    torch.testing.assert_close(routed_experts(x, ids, torch.ones(7, 3).double(), gate_up, down), dense(x))


def test_tokens_and_experts_may_be_relabelled():
    x, ids, gates, gate_up, down = (t.detach() for t in inputs(12, 8, 5, 6, 2))
    y = routed_experts(x, ids, gates, gate_up, down)
    tokens, experts = torch.randperm(12), torch.randperm(6)
    torch.testing.assert_close(routed_experts(x[tokens], ids[tokens], gates[tokens], gate_up, down), y[tokens])
    label = torch.argsort(experts)
    torch.testing.assert_close(routed_experts(x, label[ids], gates, gate_up[experts], down[experts]), y)


@pytest.mark.parametrize("width", [7, 8])
def test_bfloat16_is_close_and_non_contiguous_input_works(width):
    x, ids, gates, gate_up, down = (t.detach() for t in inputs(20, width, 6, 4, 2))
    strided = x.t().contiguous().t()
    torch.testing.assert_close(
        routed_experts(strided, ids, gates, gate_up, down), routed_experts(x, ids, gates, gate_up, down)
    )
    half = routed_experts(x.bfloat16(), ids, gates, gate_up.bfloat16(), down.bfloat16())
    exact = routed_experts(x, ids, gates, gate_up, down)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() / exact.norm() < 0.02


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    layer = Experts(8, 6, 4)
    initialize_(layer, 0)
    x, ids, gates, *_ = inputs(20, 8, 6, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, ids, gates)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.gate_up.grad.dtype == torch.float32


def test_runs_are_bitwise_repeatable():
    x, ids, gates, gate_up, down = inputs(200, 16, 8, 8, 3, dtype=torch.float32)
    results = [torch.autograd.grad(routed_experts(x, ids, gates, gate_up, down).sum(), (x, gate_up)) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
