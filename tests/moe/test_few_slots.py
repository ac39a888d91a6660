"""Few tokens without gradients take a path of their own: the same sums as the one that trains."""

import pytest
import torch

from quintic.moe import MoE, expert_kernels, routed
from quintic.moe.routed import routed_experts


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_sum(tokens, gated, normalize, dtype):
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 12, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.stack([torch.randperm(5, generator=g)[:3] for _ in range(tokens)])
    gates = torch.rand(tokens, 3, generator=g, dtype=torch.float64).float()
    w_in = torch.randn(5, 16 if gated else 8, 12, generator=g, dtype=torch.float64).to(dtype)
    w_out = torch.randn(5, 12, 8, generator=g, dtype=torch.float64).to(dtype)
    expected = routed_experts(x, ids, gates, w_in, w_out, normalize=normalize)
    with torch.no_grad():
        found = routed_experts(x, ids, gates, w_in, w_out, normalize=normalize)
    assert found.dtype == dtype
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (found - expected).double().norm() < limit * expected.double().norm()


def test_few_slots_are_not_sorted(monkeypatch):
    layer = MoE(16, 8, 6, 2).eval()
    monkeypatch.setattr(routed, "lay_out", None)
    monkeypatch.setattr(expert_kernels, "kernels_for", lambda *a, **k: None)
    with torch.no_grad():
        layer(torch.randn(16, 16))
        with pytest.raises(TypeError):
            layer(torch.randn(17, 16))


def test_a_layer_with_transposed_input_and_no_tokens():
    torch.manual_seed(0)
    layer = MoE(16, 8, 6, 2).eval()
    x = torch.randn(16, 4).T
    expected = layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-6)
        assert layer(x[:0]).shape == (0, 16)
