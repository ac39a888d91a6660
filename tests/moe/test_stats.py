"""Statistics of the load against counting by hand, simulation and information theory."""

import math

import pytest
import torch

from quintic.core import DataError
from quintic.core.initial import initialize_
from quintic.moe import (
    AuxLoss,
    ExpertStats,
    MoE,
    RouteRecorder,
    aux_loss,
    balance_step,
    max_violation,
    sampling_floor,
    specialisation,
)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 64, 6), (2048, 16, 2), (2048, 32, 4), (8192, 64, 6)])
def test_sampling_floor_against_simulation(tokens, experts, k):
    g = torch.Generator().manual_seed(0)
    found = [
        max_violation(torch.bincount(torch.rand(tokens, experts, generator=g).topk(k).indices.flatten()))
        for _ in range(20)
    ]
    assert sampling_floor(tokens, experts, k) == pytest.approx(sum(found) / len(found), rel=0.12)


def test_stats_of_a_collapsed_layer_and_of_none():
    stats = ExpertStats.from_counts(torch.tensor([5, 5, 0, 0]), top_k=2, bias_e=torch.tensor([0.5, 0, 0, -0.5]))
    assert stats.load == [0.5, 0.5, 0.0, 0.0]
    assert (stats.max_violation, stats.dead_experts, stats.tokens) == (1.0, 2, 5)
    assert stats.bias == [0.5, 0.0, 0.0, -0.5] and stats.entropy is None
    assert ExpertStats.from_counts(torch.zeros(4, dtype=torch.int64), top_k=2).max_violation == 0.0


def test_specialisation_by_hand():
    """Tokens that differ in how sure they are: I / (H(expert) - ln k) from the definition."""
    table = torch.tensor([[90, 10], [20, 80]]) * 1000  # so many that the correction does not show
    p = table.double() / table.sum()
    mutual = (p * (p / (p.sum(1, keepdim=True) * p.sum(0))).log()).sum().item()
    entropy = -(p.sum(0) * p.sum(0).log()).sum().item()
    assert specialisation(table, top_k=1) == pytest.approx(mutual / entropy, rel=1e-3)


def test_specialisation_is_the_same_scale_for_every_k_and_sample_size():
    g = torch.Generator().manual_seed(0)
    experts, vocab, k = 16, 50, 3
    owner = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(vocab)])
    decided, chance = (torch.zeros(vocab, experts, dtype=torch.int64) for _ in range(2))
    for token in torch.randint(0, vocab, (3000,), generator=g).tolist():
        decided[token, owner[token]] += 1
        chance[token, torch.randperm(experts, generator=g)[:k]] += 1
    assert specialisation(decided, k) > 0.97
    assert specialisation(chance, k) < 0.01  # without the correction 0.04
    assert specialisation(torch.zeros(3, 4), 2) == 0.0
    assert specialisation(torch.ones(3, 1), 1) == 0.0


def test_recorder_counts_by_token_and_stops_when_closed():
    layers = torch.nn.ModuleList(MoE(16, 8, num_experts=4, top_k=2) for _ in range(2))
    initialize_(layers, 0)
    layers.eval()
    x, ids = torch.randn(2, 9, 16), torch.randint(0, 5, (2, 9))
    ids[0, 3] = -1
    with RouteRecorder(layers, vocab_size=5) as recorder, torch.no_grad():
        for part in (slice(0, 1), slice(1, 2)):
            recorder.tokens = ids[part]
            for layer in layers:
                layer(x[part])
    for layer in layers:
        layer(x)
    for layer, table, counts in zip(layers, recorder.tables, recorder.counts, strict=True):
        chosen = layer.router(x.view(18, 16)).ids_nk
        expected = torch.zeros(5, 4, dtype=torch.int64)
        for token, experts in zip(ids.flatten().tolist(), chosen.tolist(), strict=True):
            for e in experts if token >= 0 else ():
                expected[token, e] += 1
        assert torch.equal(table, expected) and torch.equal(counts, expected.sum(0))
    assert recorder.max_violation == [max_violation(table.sum(0)) for table in recorder.tables]
    assert recorder.specialisation == [specialisation(table, 2) for table in recorder.tables]


def test_recorder_without_token_ids():
    layer = MoE(16, 8, num_experts=4, top_k=2)
    initialize_(layer, 0)
    with RouteRecorder(layer) as recorder:
        layer(torch.randn(2, 5, 16))
    assert recorder.counts[0].sum() == 20 and recorder.counts[0].dtype == torch.int64
    with RouteRecorder(layer, vocab_size=5) as recorder:
        with pytest.raises(DataError, match=r"set recorder\.tokens"):
            layer(torch.randn(2, 5, 16))
        recorder.tokens = torch.zeros(7, dtype=torch.int64)
        with pytest.raises(DataError, match="has 7 ids, the layer routed 10"):
            layer(torch.randn(2, 5, 16))


def test_tables_are_small_where_counts_are():
    layer, x, ids = MoE(16, 8, num_experts=4, top_k=2), torch.randn(9, 16), torch.arange(9) % 5
    found = []
    for most in (None, 2**31, 2**31 - 1):
        with RouteRecorder(layer, 5, most=most) as recorder:
            recorder.tokens = ids
            layer(x)
        found.append(recorder)
    assert [each.tables[0].dtype for each in found] == [torch.int64, torch.int64, torch.int32]
    for each in found[1:]:
        assert torch.equal(each.counts[0], found[0].counts[0]) and each.counts[0].dtype == torch.int64
        assert each.max_violation == found[0].max_violation and each.specialisation == found[0].specialisation


def test_router_entropy_is_that_of_the_normalised_scores():
    layer = MoE(16, 8, num_experts=4, top_k=2)
    initialize_(layer, 0)
    x, mask = torch.randn(1, 20, 16), torch.arange(20).unsqueeze(0) < 13
    layer(x, mask)
    scores = torch.sigmoid(x.view(20, 16) @ layer.router.weight.t())[:13]
    share = scores / scores.sum(1, keepdim=True)
    entropy, tokens = layer.meter.sums[:2].tolist()
    assert tokens == 13
    assert entropy * 1e-9 / tokens == pytest.approx(-(share * share.log()).sum(1).mean().item(), rel=1e-5)
    assert entropy * 1e-9 / tokens < math.log(4)


def test_router_entropy_of_many_tokens_is_that_of_every_so_many_th():
    layer = MoE(16, 8, num_experts=4, top_k=2)
    initialize_(layer, 0)
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(600) % 6 < 3  # every second token: those of even number
    layer(x, mask)
    some = x[::2][mask[::2]]
    share = torch.sigmoid(some @ layer.router.weight.t())
    share = share / share.sum(1, keepdim=True)
    entropy, tokens = layer.meter.sums[:2].tolist()
    assert tokens == len(some) == 200
    assert entropy * 1e-9 / tokens == pytest.approx(-(share * share.log()).sum(1).mean().item(), rel=1e-5)


def test_tokens_without_a_score_or_a_number_do_not_spoil_the_statistics():
    layer = MoE(16, 8, num_experts=4, top_k=2, score="relu", balance=AuxLoss(1.0))
    initialize_(layer, 0)
    with torch.no_grad():
        layer.router.weight.abs_()
    x = torch.rand(10, 16, generator=torch.Generator().manual_seed(0))
    x[3] = -1.0  # no positive logit: entropy 0
    layer(x)
    share = (x @ layer.router.weight.t()).clamp(min=0)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-30)
    expected = torch.special.entr(share).sum(1).mean().item()
    aux_loss(layer)
    assert balance_step(layer)[0].entropy == pytest.approx(expected, rel=1e-5)
    x[4] = torch.nan
    layer(x)
    aux_loss(layer)
    (stats,) = balance_step(layer)
    assert 0 <= stats.entropy < math.log(4) and stats.aux_loss == 0.0 and stats.tokens == 10
