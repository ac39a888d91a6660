"""Balance within a sequence: fading quantiles against sorting, causality, states that go on."""

import pytest
import torch

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.moe import LossFree, MoE, MovingQuantile, max_violation
from quintic.moe.sequence import moving_quantile


def scores(s=2, t=60, e=3, seed=0):
    return torch.rand(s, t, e, generator=torch.Generator().manual_seed(seed))


def weighted_quantile(values, weights, level):
    order = values.argsort()
    reached = weights[order].cumsum(0)
    return values[order][(reached < level * reached[-1]).sum()]


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_against_sorting(decay):
    x = scores()
    cuts, _ = moving_quantile(x, 0.25, decay=decay)
    for s, t, e in [(0, 0, 0), (0, 7, 1), (1, 30, 2), (1, 59, 0)]:
        weights = decay ** torch.arange(t, -1, -1.0)
        exact = weighted_quantile(x[s, : t + 1, e], weights, 0.75)
        assert cuts[s, t, e] == pytest.approx(exact.item(), abs=0.0101)  # one of 100 bins


def test_cuts_are_found_within_a_bin():
    even = (torch.arange(2000.0) + 0.5) / 2000
    cuts, _ = moving_quantile(even.view(1, -1, 1), 0.345, decay=1.0)
    assert cuts[0, -1, 0].item() == pytest.approx(0.655, abs=1e-3)  # a bin is 0.01 wide


def test_the_shift_is_a_part_of_the_cut_of_the_share_that_is_chosen():
    x = scores(2, 20, 4)
    for strength, k in ((0.3, 1), (1.0, 2)):
        shift = MovingQuantile(strength, decay=0.9).shift((2, 20), k)(x.view(40, 4))
        torch.testing.assert_close(shift.view(2, 20, 4), -strength * moving_quantile(x, k / 4, decay=0.9)[0])


def test_causal_and_may_be_cut_anywhere():
    x = scores()
    whole, end = moving_quantile(x, 0.3)
    changed = x.clone()
    changed[:, 40:] = 0.9
    assert torch.equal(moving_quantile(changed, 0.3)[0][:, :40], whole[:, :40])
    first, state = moving_quantile(x[:, :25], 0.3)
    before = state.clone()
    second, again = moving_quantile(x[:, 25:], 0.3, state_seb=state)
    assert torch.equal(state, before)  # it may be gone on with again
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(again, end)


def test_padding_is_no_part_of_the_history():
    """Tokens with a mask have the cuts that they have alone, wherever the padding stands."""
    x, mask = scores(), torch.ones(2, 60, dtype=torch.bool)
    mask[0, :20] = mask[1, 10:35] = False
    cuts, end = moving_quantile(x, 0.3, mask_st=mask)
    for s in range(2):
        alone, after = moving_quantile(x[s : s + 1, mask[s]], 0.3)
        torch.testing.assert_close(cuts[s, mask[s]], alone[0])
        torch.testing.assert_close(end[s], after[0])
    layer, tokens = layer_and_input(MovingQuantile(1.0))
    padded = torch.cat([torch.randn(6, 5, 16), tokens], dim=1)
    seen = torch.arange(205).expand(6, 205) >= 5
    torch.testing.assert_close(layer(padded, seen)[:, 5:], layer(tokens), rtol=1e-4, atol=1e-5)


def layer_and_input(balance):
    layer = MoE(16, 8, num_experts=8, top_k=2, balance=balance)
    initialize_(layer, 0)
    g = torch.Generator().manual_seed(0)
    # Every sequence has a topic, which some experts like.
    return layer, torch.randn(6, 200, 16, generator=g) * 0.5 + torch.randn(6, 1, 16, generator=g)


def test_sequences_are_more_even_and_gates_stay_raw_scores():
    violation, routed = {}, {}
    for strength in (0.0, 1.0):
        layer, x = layer_and_input(LossFree() + MovingQuantile(strength, decay=1.0))
        flat = x.view(-1, 16)
        ids = layer.router(flat, shift=layer.balance.shift(x.shape[:2], 2)).ids_nk
        violation[strength] = sum(max_violation(torch.bincount(part.flatten(), minlength=8)) for part in ids.chunk(6))
        routed[strength] = layer(x)
        score = torch.sigmoid(flat @ layer.router.weight.t()).gather(1, ids)
        gates = layer.router.scale * score / score.sum(1, keepdim=True)
        own = layer.experts(flat, ids, gates) + layer.shared(flat)
        torch.testing.assert_close(routed[strength].view(-1, 16), own, rtol=1e-4, atol=1e-5)
    assert violation[1.0] < 0.5 * violation[0.0]


def test_bad_use():
    layer, x = layer_and_input(MovingQuantile())
    with pytest.raises(ConfigError, match="batch, time, width"):
        layer(x.view(-1, 16))
    for kwargs in ({"strength": 1.5}, {"decay": 0.0}):
        with pytest.raises(ConfigError):
            MovingQuantile(**kwargs)
