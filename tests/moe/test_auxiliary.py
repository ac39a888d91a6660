"""Auxiliary losses: values that measure balance, gradients against a derivation by hand and finite differences."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintic.core import ConfigError
from quintic.moe import AuxLoss, ZLoss

E, K = 6, 2


class Routed(NamedTuple):
    """What a balancer reads of a router's answer."""

    ids_nk: torch.Tensor
    scores_ne: torch.Tensor
    logits_ne: torch.Tensor


def routed(tokens=24, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, E, generator=g, dtype=dtype) + torch.randn(E, generator=g, dtype=dtype)
    logits.requires_grad_()
    scores = torch.sigmoid(logits)
    return Routed(scores.topk(K).indices, scores, logits)


def loss_of(aux, r, mask=None, rows=None, counts=None):
    rows = rows or (r.ids_nk.shape[0],)
    counts = load(r) if counts is None else counts
    return aux.loss(r, mask, rows, counts)


def load(r, tokens=slice(None)):
    return torch.bincount(r.ids_nk[tokens].flatten(), minlength=E)


def gradient(aux, r, **kwargs):
    return torch.autograd.grad(loss_of(aux, r, **kwargs), r.logits_ne, retain_graph=True)[0]


def by_hand(r, weight_e, normalized=True, tokens=slice(None)):
    """Gradient of sum_i weight_i P_i: w_i for a score, (w_i - sum_j w_j p_j) / sum rho for a normalised one."""
    rho = r.scores_ne.detach()
    slope = rho * (1 - rho)
    out = torch.zeros_like(rho)
    for n in range(rho.shape[0])[tokens]:
        total = rho[n].sum()
        inner = (weight_e - (weight_e * rho[n] / total).sum()) / total if normalized else weight_e
        out[n] = inner * slope[n] / len(range(rho.shape[0])[tokens])
    return out


F = lambda r, tokens=slice(None): load(r, tokens).double() / load(r, tokens).sum()  # noqa: E731


def test_squared_value_and_gradient_by_hand():
    r = routed()
    f = F(r)
    assert loss_of(AuxLoss(0.5), r).item() == pytest.approx(0.5 * E / 2 * ((f - 1 / E) ** 2).sum().item())
    torch.testing.assert_close(gradient(AuxLoss(0.5), r), by_hand(r, 0.5 * E * (f - 1 / E)))


def test_the_usual_loss_has_the_gradient_of_f_p_and_the_value_of_the_squared_one():
    r = routed()
    f_p = E * (F(r) * (r.scores_ne / r.scores_ne.sum(-1, keepdim=True)).mean(0)).sum()
    usual = AuxLoss(0.3, "usual")
    torch.testing.assert_close(gradient(usual, r), torch.autograd.grad(0.3 * f_p, r.logits_ne, retain_graph=True)[0])
    torch.testing.assert_close(gradient(usual, r), gradient(AuxLoss(0.3), r))
    torch.testing.assert_close(loss_of(usual, r), loss_of(AuxLoss(0.3), r))


TARGET = (0.3, 0.2, 0.2, 0.1, 0.1, 0.1)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("target", [None, TARGET])
def test_any_target_and_unnormalised_scores(normalized, target):
    r = routed()
    q = torch.full((E,), 1 / E).double() if target is None else torch.tensor(target).double()
    aux = AuxLoss(1.0, target=target, normalized=normalized)
    torch.testing.assert_close(gradient(aux, r), by_hand(r, E * (F(r) - q), normalized))
    if not (normalized and target is None):
        # F.P alone is then another loss, and is refused with the way out.
        assert not torch.allclose(gradient(aux, r), by_hand(r, E * F(r), normalized))
        with pytest.raises(ConfigError, match=r"\(F - Q\)\.P"):
            AuxLoss(kind="usual", target=target, normalized=normalized)


@pytest.mark.parametrize("target", [None, TARGET])
def test_entropy_by_hand(target):
    """sum F log(F / Q) with half a choice more for each expert; log(F / Q) . grad P as sum P = 1."""
    r = routed()
    q = torch.full((E,), 1 / E).double() if target is None else torch.tensor(target).double()
    choices = load(r).sum()
    smooth = (load(r) + 0.5 * E * q) / (choices + 0.5 * E)
    aux = AuxLoss(1.0, "entropy", target=target)
    assert loss_of(aux, r).item() == pytest.approx((smooth * (smooth / q).log()).sum().item())
    scale = choices / (choices + 0.5 * E)
    torch.testing.assert_close(gradient(aux, r), by_hand(r, scale * (smooth / q).log()))


def test_entropy_of_a_collapsed_layer_is_finite_and_pulls():
    r = routed()
    r = r._replace(ids_nk=torch.zeros_like(r.ids_nk) + torch.arange(K))
    g = gradient(AuxLoss(1.0, "entropy"), r)
    assert g.isfinite().all() and (g[:, K:] < 0).all() and (g[:, :K] > 0).all()


@pytest.mark.parametrize("kind", ["squared", "entropy", "usual"])
def test_values_are_zero_at_the_target_and_positive_elsewhere(kind):
    r = routed(tokens=6)
    balanced = torch.arange(12).view(6, 2) % E
    assert loss_of(AuxLoss(1.0, kind), r._replace(ids_nk=balanced)).item() == pytest.approx(0.0, abs=1e-12)
    assert loss_of(AuxLoss(1.0, kind), r) > 0.01


def test_the_three_gradients_agree_to_first_order_at_balance():
    r = routed(tokens=600)
    ids = torch.arange(1200).view(600, 2) % E
    ids[:6] = ids[:6].clamp(max=3)
    r = r._replace(ids_nk=ids)
    squared, entropy = (gradient(AuxLoss(1.0, kind), r) for kind in ("squared", "entropy"))
    assert (squared - entropy).norm() < 0.05 * squared.norm()


def test_any_function_of_the_load():
    r = routed()
    price = torch.arange(1.0, E + 1).double()
    cubic = AuxLoss(2.0, lambda load: (price * load**3).sum(-1))
    f = F(r)
    assert loss_of(cubic, r).item() == pytest.approx(2 * (price * f**3).sum().item())
    torch.testing.assert_close(gradient(cubic, r), by_hand(r, 2 * 3 * price * f**2))
    with pytest.raises(ConfigError, match=r"returned shape \(\) for loads \(3, 6\)"):
        loss_of(AuxLoss(1.0, lambda load: load.square().sum(), over="sequence"), r, rows=(3, 8))
    with pytest.raises(ConfigError, match="leave out target"):
        AuxLoss(1.0, lambda load: load.square().sum(-1), target=TARGET)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["squared", "entropy"]), st.booleans(), st.sampled_from([None, TARGET]), st.integers(0, 999))
def test_gradients_are_finite_differences_of_the_loss_along_p(kind, normalized, target, seed):
    """d/dt of loss(F + t dP): the straight-through loss moved along what a change of the scores does to P."""
    r = routed(tokens=8, seed=seed)
    aux = AuxLoss(1.0, kind, target=target, normalized=normalized)
    direction = torch.randn(8, E, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)

    def p_of(logits):
        rho = torch.sigmoid(logits)
        return (rho / rho.sum(-1, keepdim=True) if normalized else rho).mean(0)

    logits, t = r.logits_ne.detach(), 1e-5
    dp = (p_of(logits + t * direction) - p_of(logits - t * direction)) / (2 * t)
    q = torch.full((E,), 1 / E).double() if target is None else torch.tensor(target).double()

    def value(f):
        if kind == "squared":
            return E / 2 * ((f - q) ** 2).sum()
        half = 0.5 * E * q / load(r).sum()
        f = (f + half) / (1 + half.sum())
        return (f * (f / q).log()).sum()

    numeric = (value(F(r) + t * dp) - value(F(r) - t * dp)) / (2 * t)
    assert (gradient(aux, r) * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-8)


def test_sequences_are_balanced_apart_and_padding_is_left_out():
    r = routed(tokens=24)
    mask = torch.ones(24, dtype=torch.bool)
    mask[5:8] = mask[16:] = False  # sequences of 5, 8 and 0 tokens
    aux = AuxLoss(1.0, over="sequence")
    found = loss_of(aux, r, mask=mask, rows=(3, 8))
    parts = [slice(0, 5), slice(8, 16)]
    expected = [E / 2 * ((F(r, part) - 1 / E) ** 2).sum().item() for part in parts]
    assert found.item() == pytest.approx(sum(expected) / 2)
    by_part = sum(by_hand(r, E * (F(r, part) - 1 / E), tokens=part) for part in parts) / 2
    torch.testing.assert_close(gradient(aux, r, mask=mask, rows=(3, 8)), by_part)
    assert loss_of(aux, r, mask=mask, rows=(1, 3, 8)) == found  # more axes before that of time are more sequences
    with pytest.raises(ConfigError, match="batch, time, width"):
        loss_of(aux, r)


def test_layers_are_not_pooled():
    """Opposite collapses look balanced together and are not apart."""
    first = routed()._replace(ids_nk=torch.arange(K).expand(24, K))
    second = routed()._replace(ids_nk=torch.arange(K, 2 * K).expand(24, K))
    apart = sum(loss_of(AuxLoss(1.0), r).item() for r in (first, second))
    pooled = torch.cat([first.ids_nk, second.ids_nk])
    together = loss_of(AuxLoss(1.0), routed(48)._replace(ids_nk=pooled)).item()
    assert apart > 3 * together


def test_global_load_is_that_of_all_micro_batches_and_the_proxy_is_local():
    r = routed()
    counts = load(r) + torch.tensor([100, 0, 0, 0, 0, 20])
    f = counts.double() / counts.sum()
    aux = AuxLoss(1.0, over="global")
    assert loss_of(aux, r, counts=counts).item() == pytest.approx(E / 2 * ((f - 1 / E) ** 2).sum().item())
    torch.testing.assert_close(gradient(aux, r, counts=counts), by_hand(r, E * (f - 1 / E)))


def test_groups_of_experts_are_balanced_instead_of_experts():
    r = routed()
    f = F(r).view(3, 2).sum(1)
    aux = AuxLoss(1.0, groups=3)
    assert loss_of(aux, r).item() == pytest.approx(3 / 2 * ((f - 1 / 3) ** 2).sum().item())
    torch.testing.assert_close(gradient(aux, r), by_hand(r, 3 * (f - 1 / 3).repeat_interleave(2)))
    with pytest.raises(ConfigError, match="6 experts do not divide into 4"):
        AuxLoss(groups=4).check(E, K)


def test_zero_scores_and_zero_tokens_are_guarded():
    logits = torch.tensor([[1.0, 2.0, 3.0, -1, -1, -1], [-1.0] * E], requires_grad=True)
    r = Routed(torch.tensor([[1, 0], [0, 1]]), torch.relu(logits), logits)  # the second token has no score at all
    g = gradient(AuxLoss(1.0), r)
    assert g.isfinite().all() and g[0].abs().sum() > 0 and g[1].eq(0).all()
    for aux in (AuxLoss(1.0), AuxLoss(1.0, "entropy"), ZLoss(1.0)):
        empty = loss_of(aux, routed(0))
        assert empty.item() == 0.0
        hidden = loss_of(aux, routed(8), mask=torch.zeros(8, dtype=torch.bool), counts=torch.zeros(E))
        assert hidden.item() == 0.0


def test_z_loss():
    r = routed()
    expected = r.logits_ne.exp().sum(-1).log() ** 2
    assert loss_of(ZLoss(0.1), r).item() == pytest.approx(0.1 * expected.mean().item())
    mask = torch.arange(24) < 5
    assert loss_of(ZLoss(0.1), r, mask=mask).item() == pytest.approx(0.1 * expected[:5].mean().item())
    assert torch.autograd.gradcheck(
        lambda logits: ZLoss(0.1).loss(r._replace(logits_ne=logits), mask, (24,), load(r)), (r.logits_ne,)
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1.0}, "finite number"),
        ({"weight": math.nan}, "finite number"),
        ({"weight": math.inf}, "finite number"),
        ({"weight": "entropy"}, "finite number >= 0, found 'entropy'"),
        ({"kind": "square"}, "did you mean 'squared'"),
        ({"over": "sequences"}, "did you mean 'sequence'"),
        ({"groups": -1}, "at least 0"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        AuxLoss(**kwargs)
    with pytest.raises(ConfigError, match="finite"):
        ZLoss(-1.0)
