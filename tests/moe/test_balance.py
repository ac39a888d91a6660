"""Balancing rules against their formulas, on a simulated router, and counted exactly once."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.core.initial import initialize_
from quintic.moe import LossFree, MoE, NoBalance, balance_step, max_violation, sampling_floor
from quintic.moe.balance import RULES

COUNTS = torch.tensor([40, 10, 30, 0])
EXCESS = torch.tensor([0.25, -0.125, 0.125, -0.25], dtype=torch.float64)  # shares less 1/4
RMS = EXCESS.square().mean().sqrt()
FLOOR = 8.0 * (40 * 0.5 * 0.5) ** 0.5 / 80  # c sigma of a share, 40 tokens, top 2 of 4
EXPECTED = {
    "sign": EXCESS.sign(),
    "sgd": EXCESS,
    "relative": EXCESS * 4,
    "rms": EXCESS / RMS,
    "floored-rms": EXCESS / max(RMS, FLOOR),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_the_formula(rule):
    bias = torch.zeros(4)
    LossFree(rule, rate=0.1).step(bias, COUNTS, top_k=2)
    torch.testing.assert_close(bias, -0.1 * EXPECTED[rule].float())


@pytest.mark.parametrize("rule", RULES)
def test_no_step_at_balance_or_without_tokens_and_no_drift(rule):
    bias = torch.tensor([0.5, -0.5, 0.25, -0.25])
    for counts in (torch.full((4,), 7), torch.zeros(4, dtype=torch.int64)):
        LossFree(rule).step(bias, counts, top_k=2)
        assert bias.tolist() == [0.5, -0.5, 0.25, -0.25]
    for _ in range(100):
        LossFree(rule, rate=0.1).step(bias, torch.tensor([70, 1, 5, 2]), top_k=2)
    assert abs(bias.mean()) < 1e-5


def test_unknown_rule_and_bad_rate():
    with pytest.raises(ConfigError, match="did you mean 'sign'"):
        LossFree("sing")
    with pytest.raises(ConfigError, match="finite"):
        LossFree(rate=float("nan"))


def simulate(balance, steps=150, tokens=2048, experts=16, k=2):
    """Fresh tokens every step, a fixed preference per expert; MaxVio of the last 20 steps."""
    offset = torch.from_numpy(Stream(0, "offset").normal(0, experts))
    bias, late = torch.zeros(experts), []
    for step in range(steps):
        logits = torch.from_numpy(Stream(0, "tokens", step).normal(0, tokens * experts)).view(tokens, experts)
        ids = (torch.sigmoid(logits + offset) + bias).topk(k).indices
        counts = torch.bincount(ids.flatten(), minlength=experts)
        balance.step(bias, counts, k)
        late.append(max_violation(counts))
    return sum(late[-20:]) / 20


def test_the_default_balances_a_skewed_router_to_the_sampling_floor():
    floor = sampling_floor(2048, 16, 2)
    assert simulate(NoBalance()) > 2.0
    assert simulate(LossFree()) < 1.5 * floor
    assert simulate(LossFree("rms", rate=0.03)) > 3 * floor  # what the noise floor is for


def layer_and_input():
    layer = MoE(16, 8, num_experts=4, top_k=2)
    initialize_(layer, 0)
    return layer, torch.randn(10, 16, requires_grad=True)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_load_is_counted_once_under_activation_checkpointing(reentrant):
    layer, x = layer_and_input()
    y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    y.sum().backward()
    assert layer.counts.sum() == 20


def test_micro_batches_add_up_and_evaluation_does_not_count():
    layer, x = layer_and_input()
    layer(x)
    whole = layer.counts.clone()
    layer.counts.zero_()
    layer(x[:3])
    layer(x[3:])
    layer.eval()
    layer(x)
    assert torch.equal(layer.counts, whole)


def test_bias_moves_after_the_batch_and_routes_the_next():
    layer, x = layer_and_input()
    before = layer(x)
    assert torch.equal(layer.router.bias, torch.zeros(4))
    (stats,) = balance_step(torch.nn.Sequential(layer))
    assert stats.tokens == 10 and sum(stats.load) == pytest.approx(1.0) and stats is layer.stats
    assert layer.counts.sum() == 0 and layer.router.bias.abs().sum() > 0
    layer.router.bias.zero_()
    torch.testing.assert_close(layer(x), before)


def test_layer_is_shared_plus_routed_and_masks_padding():
    layer, x = layer_and_input()
    routing = layer.router(x)
    expected = layer.shared(x) + layer.experts(x, routing.ids_nk, routing.gates_nk)
    mask = torch.arange(10) < 7
    torch.testing.assert_close(layer(x.view(2, 5, 16), mask.view(2, 5)), expected.view(2, 5, 16))
    assert layer.counts.sum() == 14


@pytest.mark.parametrize("kwargs", [{"top_k": 5}, {"top_k": 0}, {"top_k": 1}, {"num_experts": 0}, {"num_shared": -1}])
def test_bad_sizes_are_refused(kwargs):
    with pytest.raises(ConfigError):
        MoE(**({"d_model": 8, "d_expert": 4, "num_experts": 4, "top_k": 2} | kwargs))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 64, 6), (2048, 16, 2), (2048, 32, 4), (8192, 64, 6)])
def test_sampling_floor_against_simulation(tokens, experts, k):
    g = torch.Generator().manual_seed(0)
    found = [
        max_violation(torch.bincount(torch.rand(tokens, experts, generator=g).topk(k).indices.flatten()))
        for _ in range(20)
    ]
    assert sampling_floor(tokens, experts, k) == pytest.approx(sum(found) / len(found), rel=0.12)
