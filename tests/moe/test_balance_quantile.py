"""Quantile balancing: histograms against exact quantiles, the midpoint against the runner-up's cut."""

import pytest
import torch

from quintic.core.initial import initialize_
from quintic.moe import LossFree, MoE, balance_step, max_violation, sampling_floor
from quintic.moe.quantile import BINS, margin_histogram, quantile_cut


def scores(tokens, experts, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.sigmoid(torch.randn(tokens, experts, generator=g) + spread * torch.randn(experts, generator=g))


def exact_margins(biased, k, middle=True):
    best = biased.topk(k + 1).values
    return biased - ((best[:, k - 1 : k] + best[:, k:]) / 2 if middle else best[:, k:])


def test_cut_is_the_quantile():
    biased = scores(4001, 8)
    share = torch.linspace(0.05, 0.6, 8, dtype=torch.float64)
    found = quantile_cut(margin_histogram(biased, 2), share)
    margins = exact_margins(biased, 2)
    for e in range(8):
        exact = margins[:, e].double().quantile(1 - share[e])
        # A bin is at most 3/128 |x|^(2/3) wide, and empty space inside one is not resolved.
        assert found[e] == pytest.approx(exact.item(), abs=0.025 * exact.abs().item() ** (2 / 3) + 1e-4)


def test_histograms_add_over_micro_batches_and_leave_out_padding():
    biased = scores(100, 8)
    whole = margin_histogram(biased, 2)
    assert torch.equal(whole, sum(margin_histogram(part, 2) for part in biased.split(17)))
    mask = torch.arange(100) % 3 > 0
    assert torch.equal(margin_histogram(biased, 2, mask), margin_histogram(biased[mask], 2))
    assert whole.shape == (8, BINS) and whole.sum(1).tolist() == [100] * 8


def fixed_point(cut, k=2, tokens=4096, experts=16):
    plain = scores(tokens, experts)
    bias = torch.zeros(experts)
    for _ in range(60):
        bias -= cut(plain + bias).float()
    counts = torch.bincount((plain + bias).topk(k).indices.flatten(), minlength=experts).double()
    return float(counts.std(correction=0) / counts.mean())


def test_midpoint_reaches_the_balance_that_the_runner_ups_cut_does_not():
    share = torch.full((16,), 2 / 16, dtype=torch.float64)
    middle = fixed_point(lambda biased: quantile_cut(margin_histogram(biased, 2), share))
    runner_up = fixed_point(lambda biased: exact_margins(biased, 2, middle=False).quantile(1 - 2 / 16, dim=0))
    assert middle < 1e-3 < runner_up


def test_uneven_token_counts_and_logits_without_range():
    """Tokens * k need not divide by the experts; raw logits of any size balance in steps of at most 1."""
    g = torch.Generator().manual_seed(0)
    plain = 5.0 * (torch.randn(333, 7, generator=g) + torch.randn(7, generator=g))
    bias = torch.zeros(7)
    for _ in range(60):
        bias -= quantile_cut(margin_histogram(plain + bias, 3), torch.full((7,), 3 / 7)).float()
    assert max_violation(torch.bincount((plain + bias).topk(3).indices.flatten())) < 0.05


def test_experts_of_limited_groups_are_balanced():
    """Margins are taken among the open groups only; the closed ones wait with -inf."""
    layer = MoE(8, 4, 16, 2, num_groups=4, top_groups=2, router_offset=True, balance=LossFree("quantile"))
    initialize_(layer, 0)
    g, seen = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        layer.router.offset.normal_(generator=g)
        for _ in range(40):
            layer(torch.randn(1024, 8, generator=g))
            seen.append(balance_step(layer)[0].max_violation)
    assert seen[0] > 2.0 and sum(seen[-10:]) / 10 < 1.5 * sampling_floor(1024, 16, 2)


@pytest.mark.parametrize("k", [1, 3])
def test_groups_that_are_closed_and_scores_that_are_not_numbers(k):
    biased = scores(50, 6)
    biased[:25, 3:] = -torch.inf
    biased[30, 2] = torch.nan
    cut = quantile_cut(margin_histogram(biased, k), torch.full((6,), k / 6))
    assert cut.isfinite().all() and cut.abs().max() <= 1


def test_a_cut_far_from_zero_is_found_within_its_bin():
    """Margins of the first expert spread evenly from 0.4 to 0.8, where a bin is 0.015 wide."""
    scores = torch.zeros(20_001, 2)
    scores[:, 0] = torch.linspace(0.8, 1.6, 20_001)  # the margin is half of the lead
    histogram = margin_histogram(scores, 1)
    for share in (0.3, 0.55, 0.8):
        cut = quantile_cut(histogram, torch.tensor([share, 0.5]))[0].item()
        assert cut == pytest.approx(0.8 - 0.4 * share, abs=5e-4)


def test_a_token_without_a_runner_up_chooses_at_any_bias():
    """Two open experts of four and two choices: the cutoff is the second score itself, and no closed expert matters."""
    open_scores = torch.tensor([[0.75, 0.25]])
    biased = torch.cat([open_scores, torch.full((1, 2), -torch.inf)], dim=1)
    found = margin_histogram(biased, 2).argmax(1)
    margins = torch.tensor([0.5, 0.0, -1.0, -1.0])
    edges = torch.linspace(-1.0, 1.0, BINS + 1) ** 3
    assert found.tolist() == (torch.searchsorted(edges, margins, right=True) - 1).clamp(min=0).tolist()
    lost = margin_histogram(torch.tensor([[torch.nan, 0.1, 0.2, 0.3]]), 2)
    assert lost[0, 0] == 1  # a score that is no number is no wish


def test_nothing_to_decide():
    assert quantile_cut(margin_histogram(scores(20, 4), 4), torch.ones(4)).tolist() == [0.0] * 4
    assert quantile_cut(margin_histogram(scores(0, 4), 2), torch.full((4,), 0.5)).tolist() == [0.0] * 4
