"""Routing: ties, masks, gates from raw scores, the bias that only selects, the routed scale of published models."""

import copy

import pytest
import torch
from torch import nn

from quintic.core.initial import initialize_
from quintic.moe.router import Router, routed_scaling_factor


def make(d=16, experts=8, k=3, scale=2.0, seed=0) -> Router:
    router = Router(d, experts, k, scale=scale)
    initialize_(router, seed)
    return router


def test_against_a_plain_loop():
    router = make().double()
    router.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    routing = router(x)
    for n in range(20):
        scores = torch.sigmoid(router.weight.float() @ x[n])
        chosen = sorted(range(8), key=lambda e, s=scores: (-(s[e] + router.bias[e]).item(), e))[:3]
        assert routing.ids_nk[n].tolist() == chosen
        gates = 2.0 * scores[chosen] / scores[chosen].sum()
        torch.testing.assert_close(routing.gates_nk[n], gates, atol=1e-6, rtol=1e-5)
    assert routing.counts_e.tolist() == torch.bincount(routing.ids_nk.flatten(), minlength=8).tolist()


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_ties_go_to_the_lower_index(tokens):
    router = make(experts=64, k=6)
    routing = router(torch.zeros(tokens, 16))  # all scores are 1/2
    assert routing.ids_nk.tolist() == [list(range(6))] * tokens


def test_bias_selects_but_never_weighs():
    """A bias of 5 on scores of 1e-8 must not leak into the gate, nor swallow it: (s + b) - b would be 0."""
    router = make(k=2)
    router.bias[3] = 5.0
    x = torch.randn(50, 16) * 0.1
    with torch.no_grad():
        router.weight[3] = -100.0 * torch.sign(x[0])
    routing = router(x[:1])
    assert routing.ids_nk[0, 0] == 3
    score = torch.sigmoid(x[:1] @ router.weight.t())[0]
    other = routing.ids_nk[0, 1]
    torch.testing.assert_close(routing.gates_nk[0, 0], 2.0 * score[3] / (score[3] + score[other]))


def test_masked_tokens_are_routed_but_not_counted():
    router = make()
    x = torch.randn(10, 16)
    mask = torch.arange(10) < 4
    routing = router(x, mask)
    assert routing.ids_nk.shape == (10, 3)
    assert routing.counts_e.tolist() == router(x[:4]).counts_e.tolist()


def test_router_has_a_gradient_and_the_bias_none():
    router = make()
    router(torch.randn(30, 16)).gates_nk[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert "bias" not in dict(router.named_parameters()) and not router.bias.requires_grad


def test_bias_stays_float32_and_unrounded():
    router = make()
    router.bias.fill_(5.001)
    model = nn.Sequential(copy.deepcopy(router)).to(torch.bfloat16)
    assert model[0].bias.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    assert model[0].bias.tolist() == router.bias.tolist()
    assert "0.bias" in model.state_dict()


def test_scores_are_float32_under_autocast():
    router = make(experts=64, k=6)
    x = torch.randn(500, 16)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.ids_nk, cast.ids_nk) and torch.equal(plain.gates_nk, cast.gates_nk)


@pytest.mark.parametrize(("experts", "k", "published"), [(64, 6, 2.446), (256, 8, 2.83)])
def test_routed_scale_of_published_models(experts, k, published):
    """Moonlight's configured 2.446 and the 2.83 that post 10945 computes for DeepSeek-V3's shape."""
    assert routed_scaling_factor(experts, k) == pytest.approx(published, abs=0.01)
