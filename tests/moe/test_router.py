"""Routing: ties, masks, gates from raw scores, the bias that only selects, the routed scale of published models."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.moe.router import Router, argtop, routed_scaling_factor
from quintic.moe.score import smooth_topk


def make(d=16, experts=8, k=3, scale=2.0, seed=0, **options) -> Router:
    router = Router(d, experts, k, scale=scale, **options)
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


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_and_their_gradient_with_and_without_a_graph(normalize):
    router = make(normalize_gates=normalize)
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router(x).gates_nk, x)
    with torch.no_grad():
        found = router(x).gates_nk
    assert torch.equal(found, router(x).gates_nk)


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


numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-38, -1e-38, math.inf, -math.inf]) | st.floats(width=32).filter(
    lambda value: not math.isnan(value)
)


@given(st.lists(numbers, min_size=1, max_size=12), st.data())
def test_argtop_is_a_stable_sort_of_any_float(row, data):
    k = data.draw(st.integers(1, len(row)))
    expected = sorted(range(len(row)), key=lambda i: (-torch.tensor(row[i]).item(), i))[:k]
    for rows in (1, 17):  # few are sorted, many go by integers
        assert argtop(torch.tensor([row] * rows), k).tolist() == [expected] * rows


@pytest.mark.parametrize("rows", [3, 40])
def test_a_nan_of_either_sign_counts_as_the_largest(rows):
    row = torch.tensor([1.0, math.inf, math.inf - math.inf, 2.0])
    row[2] = -row[2].abs()
    for nan in (row, -row.abs()):
        assert nan.isnan().sum() == 1
        assert argtop(nan.repeat(rows, 1), 1).tolist() == [[2]] * rows


@pytest.mark.parametrize("fill", [math.nan, 1e6])
def test_tokens_that_are_not_numbers_and_saturated_scores_go_to_the_lowest_experts(fill):
    router = make(experts=64, k=6)
    with torch.no_grad():
        router.weight.abs_()
    for tokens in (3, 40):
        assert router(torch.full((tokens, 16), fill)).ids_nk.tolist() == [list(range(6))] * tokens


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_experts_that_learn_from_a_token(score):
    """Every chosen one; the others only where a sum over all experts ties them together."""
    router = make(score=score, normalize_gates=False)
    routing = router(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    routing.gates_nk.sum().backward()
    learns = router.weight.grad.abs().sum(1) > 0
    assert learns[routing.ids_nk[0]].all() and learns.sum() == (3 if score == "sigmoid" else 8)


SCORES = {
    "softmax": lambda x: x.exp() / x.exp().sum(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "smooth_topk": lambda x: smooth_topk(x[None], 3)[0],
    "own": lambda x: x.square(),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_selects_and_weighs_by_its_formula(score, normalize):
    router = make(score=torch.square if score == "own" else score, normalize_gates=normalize)
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    routing = router(x)
    for n in range(30):
        rho = SCORES[score](router.weight @ x[n])
        chosen = sorted(range(8), key=lambda e, s=rho: (-s[e].item(), e))[:3]
        assert routing.ids_nk[n].tolist() == chosen
        gates = rho[chosen] / rho[chosen].sum() if normalize else rho[chosen]
        torch.testing.assert_close(routing.gates_nk[n], 2.0 * gates)
        torch.testing.assert_close(routing.scores_ne[n], rho)


def test_smooth_topk_sums_to_k_orders_like_its_input_and_has_the_right_gradient():
    x = 5.0 * torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (1, 3, 6):
        score = smooth_topk(x, k)
        torch.testing.assert_close(score.sum(1), torch.full((6,), float(k)).double())
        assert torch.equal(score.argsort(1), x.argsort(1))
    assert torch.autograd.gradcheck(lambda x: smooth_topk(x, 3), x.requires_grad_())
    flat = torch.tensor([[900.0, 800.0, -900.0]], requires_grad=True)  # every sigmoid is flat at the cut
    score = smooth_topk(flat, 2)
    score.square().sum().backward()
    assert score[0].tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6) and flat.grad.abs().max() < 1e-5


def test_select_with_one_score_and_gate_with_another():
    router = make(score="softmax", select="sigmoid", normalize_gates=False)
    router.bias.copy_(torch.linspace(-0.4, 0.4, 8))
    x = torch.randn(40, 16)
    routing, logits = router(x), x @ router.weight.t()
    assert torch.equal(routing.ids_nk, argtop(torch.sigmoid(logits) + router.bias, 3))
    torch.testing.assert_close(routing.gates_nk, 2.0 * torch.softmax(logits, 1).gather(1, routing.ids_nk))
    torch.testing.assert_close(routing.scores_ne, torch.sigmoid(logits))


def test_tokens_without_a_positive_relu_score_get_nothing():
    router = make(score="relu")
    x = -router.weight.detach().sum(0, keepdim=True) * 100
    with torch.no_grad():
        router.weight.copy_(router.weight.abs())
    routing = router(-x.abs())
    assert routing.gates_nk.eq(0).all() and routing.ids_nk.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (2, 1, 2), (8, 3, 3), (4, 4, 5)])
def test_groups_limit_the_choice(groups, kept, k):
    """Kept groups have the largest sums of their two best biased scores; nothing else may win, even below zero."""
    router = make(experts=8, k=k, num_groups=groups, top_groups=kept)
    router.bias.copy_(torch.linspace(-1.4, -1.0, 8).roll(3))  # less than the scores differ by
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    routing = router(x)
    for n in range(100):
        biased = (torch.sigmoid(router.weight @ x[n]) + router.bias).view(groups, -1)
        best = biased.sort(1, descending=True)[0][:, :2].sum(1)
        keep = sorted(range(groups), key=lambda g, b=best: (-b[g].item(), g))[:kept]
        size = 8 // groups
        allowed = [g * size + i for g in keep for i in range(size)]
        flat = biased.flatten()
        assert routing.ids_nk[n].tolist() == sorted(allowed, key=lambda e, s=flat: (-s[e].item(), e))[:k]
        outside = [e for e in range(8) if e not in allowed]
        assert routing.biased_ne[n, outside].eq(-math.inf).all()


def test_the_first_logits_of_unit_tokens_are_standard_normal_and_an_offset_changes_none():
    """As :func:`routed_scaling_factor` supposes."""
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    plain, offset = (make(256, 64, offset=flag)(x).logits_ne for flag in (False, True))
    assert plain.std().item() == pytest.approx(1.0, rel=0.03) and torch.equal(plain, offset)


def test_offset_shift_and_kept_choice():
    router = make(offset=True)
    x = torch.randn(20, 16)
    with torch.no_grad():
        router.offset[5] = 50.0
    assert router(x).ids_nk[:, 0].eq(5).all()
    shifted = router(x, shift=lambda scores: torch.full_like(scores, 0.0).index_fill_(1, torch.tensor([2]), 9.0))
    assert shifted.ids_nk[:, 0].eq(2).all()
    own = torch.tensor([[7, 1, 3]]).expand(20, 3)
    kept = router(x, keep=lambda ids: own)
    assert torch.equal(kept.ids_nk, own) and kept.counts_e.tolist() == [0, 20, 0, 20, 0, 0, 0, 20]
    torch.testing.assert_close(kept.gates_nk.sum(1), torch.full((20,), 2.0))


def test_float64_routes_in_float64_and_bfloat16_in_float32():
    router = make()
    x = torch.randn(50, 16)
    single = router(x)
    double, half = make().double()(x.double()), make().bfloat16()(x.bfloat16())
    assert double.gates_nk.dtype == torch.float64 and half.gates_nk.dtype == torch.float32
    assert torch.equal(double.ids_nk, single.ids_nk)
    weight = make().weight.bfloat16().float()
    assert torch.equal(half.ids_nk, argtop(torch.sigmoid(x.bfloat16().float() @ weight.t()), 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"select": "softmin"}, "select = 'softmin' is unknown"),
        ({"score": "one"}, "cannot select"),
        ({"k": 1}, "without gradient"),
        ({"k": 9}, "between 1 and num_experts = 8"),
        ({"k": 8, "score": "smooth_topk"}, "top_k < num_experts"),
        ({"num_groups": 3}, "divide num_experts = 8"),
        ({"num_groups": 4, "top_groups": 5}, "between 1 and num_groups = 4"),
        ({"num_groups": 4, "top_groups": 1}, "exceeds the 2 experts of 1 groups"),
        ({"score": lambda logits: logits.sum(1)}, "one score per token and expert"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)(torch.randn(4, 16))


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ({"num_experts": 64, "top_k": 6}, 2.446),
        ({"num_experts": 256, "top_k": 8}, 2.83),
        ({"num_experts": 160, "top_k": 6, "num_shared": 2, "score": "softmax", "normalize_gates": False}, 16.0),
    ],
)
def test_routed_scale_of_published_models(arguments, published):
    """Moonlight's configured 2.446, DeepSeek-V2's 16, and the 2.83 that post 10945 computes for DeepSeek-V3's shape."""
    assert routed_scaling_factor(**arguments) == pytest.approx(published, rel=0.004)
