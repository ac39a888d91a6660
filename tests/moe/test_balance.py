"""Balancing rules against their formulas and on a simulated router; targets, schedules, combinations."""

import functools

import pytest
import torch

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.moe import AuxLoss, Combination, LossFree, MoE, NoBalance, ZLoss, max_violation, sampling_floor
from quintic.moe.balance import RATES, RULES
from quintic.moe.quantile import margin_histogram
from quintic.moe.sequence import MovingQuantile

COUNTING_RULES = [rule for rule in RULES if rule != "quantile"]

COUNTS = torch.tensor([40, 10, 30, 0])
EXCESS = torch.tensor([0.25, -0.125, 0.125, -0.25], dtype=torch.float64)  # shares less 1/4
RMS = EXCESS.square().mean().sqrt()
NOISE = (40 * 0.5 * 0.5) ** 0.5 / 80  # sigma of a share, 40 tokens, top 2 of 4
EXPECTED = {
    "sign": EXCESS.sign(),
    "sgd": EXCESS,
    "relative": EXCESS * 4,
    "rms": EXCESS / RMS,
    "floored-rms": EXCESS / max(RMS, 8.0 * NOISE, 0.1 * 0.25 / 0.03),
}


@pytest.mark.parametrize("rule", COUNTING_RULES)
def test_one_step_is_the_formula(rule):
    bias = torch.zeros(4)
    LossFree(rule, rate=0.1).step(bias, COUNTS, top_k=2)
    torch.testing.assert_close(bias, -0.1 * EXPECTED[rule].float())


@pytest.mark.parametrize("rule", COUNTING_RULES)
def test_no_step_at_balance_or_without_tokens_and_no_drift(rule):
    bias = torch.tensor([0.5, -0.5, 0.25, -0.25])
    for counts in (torch.full((4,), 7), torch.zeros(4, dtype=torch.int64)):
        LossFree(rule).step(bias, counts, top_k=2)
        assert bias.tolist() == [0.5, -0.5, 0.25, -0.25]
    for _ in range(100):
        LossFree(rule, rate=0.1).step(bias, torch.tensor([70, 1, 5, 2]), top_k=2)
    assert abs(bias.mean()) < 1e-5


@pytest.mark.parametrize("rule", COUNTING_RULES)
def test_counts_beyond_the_integers_of_float32(rule):
    bias, counts = torch.zeros(2), torch.tensor([2**25 + 1, 2**25 - 1])
    assert counts.float().unique().numel() == 1
    LossFree(rule, rate=1e3 if rule in ("sgd", "relative") else None).step(bias, counts, top_k=1)
    assert bias[0] < 0 < bias[1]


def test_unknown_rule_and_bad_rate():
    with pytest.raises(ConfigError, match="did you mean 'sign'"):
        LossFree("sing")
    with pytest.raises(ConfigError, match="finite"):
        LossFree(rate=float("nan"))
    with pytest.raises(ConfigError, match=r"unknown balancing rule 0\.1; expected one of"):
        LossFree(0.1)


@functools.cache
def batches(tokens, experts):
    """Logits of 64 batches; simulations go round them."""
    normal = Stream(0, "tokens").normal(0, 64 * tokens * experts)
    return torch.from_numpy(normal).float().view(64, tokens, experts).unbind(0)


def simulate(balance, steps=150, tokens=2048, experts=16, k=2):
    """A fixed preference per expert; MaxVio of every step, and the load of the last 20 together."""
    offset = torch.from_numpy(Stream(0, "offset").normal(0, experts)).float()
    scores = [torch.sigmoid(logits + offset) for logits in batches(tokens, experts)]
    histogram = margin_histogram if balance.wants_histogram else lambda biased, k: None
    bias, seen, late = torch.zeros(experts), [], torch.zeros(experts, dtype=torch.int64)
    for step in range(steps):
        biased = scores[step % len(scores)] + bias
        counts = torch.bincount(biased.topk(k).indices.flatten(), minlength=experts)
        balance.step(bias, counts, k, histogram_eb=histogram(biased, k))
        seen.append(max_violation(counts))
        late += counts * (step >= steps - 20)
    return seen, late


def late_violation(*args, **kwargs):
    seen, _ = simulate(*args, **kwargs)
    return sum(seen[-20:]) / 20


FLOOR_2048_16_2 = sampling_floor(2048, 16, 2)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_at_its_own_rate_balances_a_skewed_router(rule):
    assert late_violation(NoBalance()) > 2.0
    slow = rule in ("sign", "rms")  # 0.001 per step over a spread of scores of about 0.4
    assert late_violation(LossFree(rule), steps=400 if slow else 150) < 1.5 * FLOOR_2048_16_2


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 1e-1, 3e-1])
def test_the_floored_rule_works_over_a_wide_range_of_rates(rate):
    assert late_violation(LossFree("floored-rms", rate), steps=400) < 1.3 * FLOOR_2048_16_2


@pytest.mark.parametrize(
    ("rate", "times", "largest"), [(1e-3, 1, "noise"), (1e-3, 10_000, "rms"), (0.05, 10_000, "gain")]
)
def test_each_floor_of_the_floored_rule(rate, times, largest):
    floors = {"noise": 8.0 * NOISE / times**0.5, "rms": RMS.item(), "gain": rate * 0.25 / 0.03}
    assert max(floors, key=lambda name: floors[name]) == largest
    bias = torch.zeros(4)
    LossFree("floored-rms", rate).step(bias, COUNTS * times, top_k=2)
    torch.testing.assert_close(bias, (-rate * EXCESS / floors[largest]).float())


@pytest.mark.parametrize("rule", ["sign", "rms"])
def test_constant_step_sizes_oscillate_at_a_large_rate(rule):
    assert late_violation(LossFree(rule, rate=0.03)) > 2 * FLOOR_2048_16_2  # what the floors are for


def test_the_default_balances_three_times_sooner_than_sign():
    def sooner(balance):
        seen, _ = simulate(balance, steps=600)
        return max(i for i, vio in enumerate(seen) if vio > 3 * FLOOR_2048_16_2)

    assert 3 * sooner(LossFree()) <= sooner(LossFree("sign", rate=1e-3))


@pytest.mark.parametrize("rule", RULES)
def test_a_target_load_is_reached(rule):
    target = tuple(0.5 / 12 for _ in range(12)) + (0.5 / 4,) * 4
    rate = {"sign": 0.003, "rms": 0.003}.get(rule)
    _, late = simulate(LossFree(rule, rate, target=target), steps=400)
    share = late / late.sum()
    assert (share / torch.tensor(target) - 1).abs().max() < 0.1


def test_schedule_of_the_rate():
    def move(progress, **schedule):
        bias = torch.zeros(4)
        LossFree("sign", rate=0.8, **schedule).step(bias, torch.tensor([2, 1, 1, 0]), 1, progress=progress)
        return round(bias[3].item(), 6)

    assert [move(p, warmup=0.1, rest=0.2) for p in (0.0, 0.05, 0.1, 0.79, 0.8, 1.0)] == [0.0, 0.4, 0.8, 0.8, 0.0, 0.0]
    assert move(None) == 0.8
    with pytest.raises(ConfigError, match="progress="):
        move(None, rest=0.1)
    with pytest.raises(ConfigError, match="together at most 1"):
        LossFree(warmup=0.6, rest=0.6)


def test_targets_that_make_no_sense_are_refused():
    for target, message in (
        ((0.5, 0.5), "2 shares for 4 experts"),
        ((0.5, 0.5, 0.1, 0.1), "sum 1"),
        ((1.0, 0.0, 0.0, 0.0), "positive"),
        ((0.7, 0.1, 0.1, 0.1), "cannot be reached"),
    ):
        with pytest.raises(ConfigError, match=message):
            LossFree(target=target).check(4, top_k=2)
    LossFree(target=(0.5, 0.3, 0.1, 0.1)).check(4, top_k=2)


def test_a_quantile_rate_is_a_part_of_the_way():
    with pytest.raises(ConfigError, match="at most 1"):
        LossFree("quantile", rate=1.5)


def test_rates_that_nobody_chose_are_those_of_the_sources():
    """sign: arXiv 2408.15664; the others are this package's own, which the documentation and the studies name."""
    rates = {"sign": 0.001, "sgd": 0.3, "relative": 0.03, "rms": 0.001, "floored-rms": 0.03, "quantile": 0.3}
    assert rates == RATES and LossFree() == LossFree("floored-rms")


def test_a_sum_answers_what_its_parts_answer():
    """Shifts and losses add up, with the mask; the schedule reaches the part that has one."""
    parts = MovingQuantile(0.2, decay=0.9), MovingQuantile(0.5), AuxLoss(0.1), ZLoss(0.2)
    both = Combination(parts)
    layer = MoE(8, 4, num_experts=4, top_k=2, balance=both)
    x, mask = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6).expand(2, 6) > 1
    scores = torch.rand(12, 4, generator=torch.Generator().manual_seed(1))
    shifts = [part.shift((2, 6), 2, mask.flatten())(scores) for part in parts[:2]]
    torch.testing.assert_close(both.shift((2, 6), 2, mask.flatten())(scores), shifts[0] + shifts[1])
    assert (LossFree() + ZLoss()).shift((2, 6), 2) is None
    routing = layer.router(x.view(12, 8), mask.flatten())
    losses = [part.loss(routing, mask.flatten(), (2, 6), routing.counts_e) for part in parts[2:]]
    torch.testing.assert_close(both.loss(routing, mask.flatten(), (2, 6), routing.counts_e), losses[0] + losses[1])
    assert (LossFree() + ZLoss()).rate_is_for_sigmoid
    assert not any(each.rate_is_for_sigmoid for each in (LossFree("quantile") + ZLoss(), LossFree(rate=0.1) + ZLoss()))
    resting, bias = LossFree("sign", rest=0.5) + ZLoss(), torch.zeros(2)
    for progress, moved in ((0.6, False), (0.4, True)):
        resting.step(bias, torch.tensor([2, 0]), 1, progress=progress)
        assert bias.any() == moved


def test_balancers_add_up():
    both = LossFree("sign") + AuxLoss(0.1) + ZLoss(0.2)
    assert both == Combination((LossFree("sign"), AuxLoss(0.1), ZLoss(0.2)))
    bias = torch.zeros(2)
    both.step(bias, torch.tensor([2, 0]), 1)
    assert bias.tolist() == pytest.approx([-RATES["sign"], RATES["sign"]])
    assert (LossFree("quantile") + AuxLoss()).wants_histogram and not both.wants_histogram
    with pytest.raises(ConfigError, match="two LossFree"):
        LossFree() + LossFree("sign")
    with pytest.raises(ConfigError, match="3 shares for 4"):
        (NoBalance() + LossFree(target=(0.4, 0.3, 0.3))).check(4, 2)
    with pytest.raises(TypeError, match="unsupported operand"):
        LossFree() + 0.1
