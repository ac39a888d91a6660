"""Spectral and adaptive clipping, the policies for what is not finite, and the memory of a run."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tests.optim.toy import randn, with_grads
from torch import nn

from quintic.core import CheckpointError, ConfigError, QuinticError
from quintic.core.roles import Normal, Role, declare
from quintic.optim.clip import (
    CLIPPING,
    GradientClipping,
    NonFiniteGradientError,
    clip_grad_norm_,
    clip_grad_spectral_,
)
from quintic.optim.norms import global_norm


def sigma(g):
    """Largest singular value by float64 SVD; the norm of a vector."""
    return torch.linalg.svdvals(g.double().reshape(len(g), -1) if g.ndim > 1 else g.double().reshape(1, -1))[0].item()


def spectral(parameters, max_norm=1.0):
    """What clipping matrix by matrix found and did."""
    return GradientClipping("spectral", max_norm)(parameters)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    rank=st.integers(1, 9),
    exponent=st.integers(-30, 30),
    max_norm=st.sampled_from([1e-3, 0.5, 1.0, 1e3]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_spectral_matches_svd_at_any_magnitude(n, m, rank, exponent, max_norm, transposed, seed):
    g = randn(n, rank, seed=seed, dtype=torch.float64) @ randn(rank, m, seed=seed + 1, dtype=torch.float64)
    g = (g * 10.0**exponent).float()
    if transposed:
        g = g.T  # not contiguous
    before = g.clone()
    expected = sigma(before)
    result = spectral(with_grads(g), max_norm)
    assert result.norm.item() == pytest.approx(before.double().norm().item(), rel=1e-6)
    assert result.scale.item() == pytest.approx(min(1.0, max_norm / expected), rel=1e-5)
    if expected > max_norm * (1 + 1e-5):
        assert bool(result.clipped)
        assert sigma(g) == pytest.approx(max_norm, rel=1e-5)
        torch.testing.assert_close(g.double(), before.double() * result.scale.item(), rtol=1e-6, atol=0)
    elif expected < max_norm * (1 - 1e-5):
        assert torch.equal(g, before)


def test_the_function_returns_the_global_norm():
    p, q = with_grads(torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([12.0]))
    assert clip_grad_spectral_([p, q]).item() == pytest.approx(13.0)
    torch.testing.assert_close(p.grad, torch.diag(torch.tensor([0.75, 1.0])))


def test_a_rule_tells_its_settings():
    assert repr(GradientClipping("spectral", 2)) == "GradientClipping('spectral', max_norm=2)"
    shown = repr(GradientClipping("adaptive", float("inf"), quantile=0.5, window=8))
    assert shown == "GradientClipping('adaptive', max_norm=inf, quantile=0.5, window=8)"


def test_one_exploding_matrix_leaves_the_others_their_size():
    small, vector, stack = randn(4, 3) * 0.1, torch.tensor([0.3, 0.4]), randn(3, 4, 5, seed=2) * 0.1
    stack[1] *= 1e6
    kept = [t.clone() for t in (small, vector, stack)]
    result = spectral(with_grads(small, vector, stack))
    assert torch.equal(small, kept[0])
    assert torch.equal(vector, kept[1])
    assert torch.equal(stack[[0, 2]], kept[2][[0, 2]])
    assert sigma(stack[1]) == pytest.approx(1.0, rel=1e-5)
    assert result.fraction.item() == pytest.approx(1 / 5)
    assert result.scale.item() == pytest.approx(1 / sigma(kept[2][1]), rel=1e-5)  # the smallest
    assert result.clipped
    assert result.threshold == 1.0
    # The global norm would have made all of them vanish.
    params = with_grads(*kept)
    clip_grad_norm_(params)
    assert params[0].grad.abs().max() < 1e-5


def test_vectors_are_clipped_by_their_euclidean_norm():
    (p,) = with_grads(torch.tensor([3.0, 4.0]))
    clip_grad_spectral_(p)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    (p,) = with_grads(torch.tensor(-7.0))
    clip_grad_spectral_(p)
    assert p.grad.item() == pytest.approx(-1.0)


class Fused(nn.Module):
    """A projection of two blocks, and a stack of experts, as this package declares them."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(8, 3))
        declare(self, "gate_up", Role.MATRIX, Normal(1.0), row_blocks=2)
        self.conv1 = nn.Conv1d(2, 4, 3, bias=False)
        self.conv2 = nn.Conv1d(4, 5, 3, bias=False)


def test_a_module_is_read_by_its_roles():
    model = Fused()
    grads = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    grads["gate_up"][4:] *= 1e-3
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    result = spectral(model, 0.5)
    assert torch.equal(model.gate_up.grad[4:], grads["gate_up"][4:])
    assert sigma(model.gate_up.grad[:4]) == pytest.approx(0.5, rel=1e-5)
    for conv in (model.conv1, model.conv2):  # three axes, and yet one matrix (out, in * kernel)
        assert sigma(conv.weight.grad) == pytest.approx(0.5, rel=1e-5)
    assert result.fraction.item() == pytest.approx(3 / 4)


@pytest.mark.parametrize(("value", "max_norm"), [(1e20, 1.0), (3e38, 1.0), (1e-30, 1e-31)])
def test_spectral_at_extreme_magnitudes(value, max_norm):
    (p,) = with_grads(torch.full((4, 4), value))
    result = spectral(p, max_norm)
    assert result.finite
    torch.testing.assert_close(p.grad, torch.full((4, 4), max_norm / 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_spectral_in_other_dtypes(dtype):
    g = (randn(20, 30) * 10).to(dtype)
    (p,) = with_grads(g)
    clip_grad_spectral_(p)
    assert p.grad.dtype == dtype
    assert sigma(p.grad) == pytest.approx(1.0, rel=1e-12 if dtype == torch.float64 else 4e-3)


def test_empty_missing_and_repeated():
    p, q = with_grads(torch.zeros(0, 3), torch.eye(2) * 8)
    without = nn.Parameter(torch.ones(2))
    result = spectral([p, q, without, q])
    torch.testing.assert_close(q.grad, torch.eye(2))
    assert result.fraction == 1.0
    nothing = spectral([without])
    assert nothing.norm == 0
    assert nothing.scale == 1
    assert not nothing.clipped


@pytest.mark.parametrize("kind", ["global", "spectral"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_policies_for_what_is_not_finite(kind, bad):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    grads = {name: randn(*p.shape, seed=i) * 100 for i, (name, p) in enumerate(model.named_parameters())}
    grads["1.weight"][0, 1] = bad

    def fill():
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()

    def untouched():
        return all(
            torch.equal(p.grad.nan_to_num(7.0), grads[name].nan_to_num(7.0)) for name, p in model.named_parameters()
        )

    fill()
    result = GradientClipping(kind)(model)
    assert not result.finite
    assert not result.clipped
    assert not result.norm.isfinite()
    assert result.scale == 1
    assert result.fraction == 0
    assert untouched()

    result = GradientClipping(kind, nonfinite="zero")(model)
    assert not result.finite
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())

    fill()
    with pytest.raises(NonFiniteGradientError, match=r"1\.weight; nothing was clipped") as caught:
        GradientClipping(kind, nonfinite="raise")(model)
    assert isinstance(caught.value, QuinticError)
    assert "0.weight" not in str(caught.value)
    assert untouched()


@pytest.mark.parametrize("kind", ["global", "spectral"])
@pytest.mark.parametrize("policy", ["keep", "zero", "raise"])
def test_the_policy_does_nothing_to_finite_gradients(kind, policy):
    (p,) = with_grads(torch.diag(torch.tensor([3.0, 0.0])))
    assert GradientClipping(kind, 1.5, nonfinite=policy)(p).clipped
    torch.testing.assert_close(p.grad, torch.diag(torch.tensor([1.5, 0.0])))


def test_wrong_settings():
    for clip in (clip_grad_norm_, clip_grad_spectral_):
        with pytest.raises(ConfigError, match="did you mean 'raise'"):
            clip([], nonfinite="rais")
        with pytest.raises(ConfigError, match="positive"):
            clip([], -1.0)
        (p,) = with_grads(torch.zeros(3, 2))
        p.grad = torch.eye(3, 2).to_sparse()
        with pytest.raises(ConfigError, match="parameter 0 is sparse"):
            clip([p])
    for wrong, message in (
        ({"kind": "globl"}, "did you mean 'global'"),
        ({"max_norm": 0.0}, "positive"),
        ({"quantile": 1.0}, "between 0 and 1"),
        ({"quantile": 0.99, "window": 50}, "at least 100"),
        ({"nonfinite": "skip"}, "keep"),
    ):
        with pytest.raises(ConfigError, match=message):
            GradientClipping(**wrong)


def run(clip, norms):
    """Clip gradients of the given norms one after the other; their norms afterwards."""
    after = []
    for norm in norms:
        p, q = with_grads(torch.tensor([0.6 * norm]), torch.tensor([[0.8 * norm]]))
        clip([p, q])
        after.append(global_norm([p.grad, q.grad]).item())
    return after


def test_adaptive_threshold_is_the_quantile_of_the_norms_before():
    norms = np.exp(np.random.default_rng(0).normal(size=60)).tolist()
    clip = GradientClipping("adaptive", max_norm=2.5, quantile=0.8, window=20)
    after = run(clip, norms)
    for i, (before, found) in enumerate(zip(norms, after, strict=True)):
        recent = norms[max(0, i - 20) : i]
        threshold = min(2.5, np.quantile(recent, 0.8)) if len(recent) >= 5 else 2.5
        assert found == pytest.approx(min(before, threshold), rel=1e-5)
    assert clip.steps == 60
    assert clip.clip_fraction == pytest.approx(np.mean([a < b * 0.999 for a, b in zip(after, norms, strict=True)]))
    assert clip.norms == pytest.approx(norms[-20:], rel=1e-6)


def test_adaptive_clips_the_share_it_says_whatever_the_scale():
    rng = np.random.default_rng(1)
    for unit in (1e-8, 1e8):
        clip = GradientClipping("adaptive", max_norm=math.inf, quantile=0.9, window=200)
        run(clip, (unit * np.exp(rng.normal(size=500))).tolist())
        assert 0.05 < clip.clip_fraction < 0.15


def test_adaptive_threshold_follows_growing_norms():
    """If clipped norms were recorded, the threshold could never rise again."""
    clip = GradientClipping("adaptive", max_norm=math.inf, quantile=0.5, window=10)
    run(clip, [1.0] * 10 + [5.0] * 10)
    assert float(clip.threshold) == pytest.approx(5.0)


def test_adaptive_threshold_of_zero_does_not_stop_training():
    clip = GradientClipping("adaptive", quantile=0.5, window=10)
    assert run(clip, [0.0] * 10 + [0.5])[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", CLIPPING)
def test_every_kind_treats_what_is_not_finite_as_asked(kind):
    (p,) = with_grads(torch.full((3, 4), math.nan))
    GradientClipping(kind, nonfinite="zero")(p)
    assert not p.grad.any()


def test_norms_that_are_not_finite_are_counted_and_not_remembered():
    clip = GradientClipping("adaptive", max_norm=math.inf, quantile=0.5, window=4)
    run(clip, [1.0, 2.0, math.nan, math.inf, 3.0])
    assert clip.norms == pytest.approx([1.0, 2.0, 3.0])
    assert clip.nonfinite_steps == 2
    assert clip.steps == 5
    run(clip, [9.0, 0.1, math.nan])
    assert clip.clip_fraction == 2 / 8  # of all calls: 3 and 9


def test_the_shortest_window_that_knows_the_quantile():
    clip = GradientClipping("adaptive", max_norm=math.inf, quantile=0.9, window=10)
    run(clip, [1.0] * 10)
    assert float(clip.threshold) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", CLIPPING)
def test_a_saved_state_continues_exactly(kind):
    norms = np.exp(np.random.default_rng(2).normal(size=40)).tolist()
    norms[7] = math.nan
    whole = GradientClipping(kind, quantile=0.8, window=10)
    expected = run(whole, norms)
    first, second = GradientClipping(kind, quantile=0.8, window=10), GradientClipping(kind, quantile=0.8, window=10)
    found = run(first, norms[:23])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += run(second, norms[23:])
    np.testing.assert_array_equal(found, expected)
    assert second.state_dict() == whole.state_dict()


def test_a_state_of_another_window_or_kind():
    long = GradientClipping("global", window=30)
    run(long, [float(i) for i in range(1, 31)])
    short = GradientClipping("adaptive", quantile=0.5, window=4)
    short.load_state_dict(long.state_dict())
    assert short.norms == pytest.approx([27.0, 28.0, 29.0, 30.0])
    with pytest.raises(CheckpointError, match="has no norms"):
        short.load_state_dict({"steps": 1, "clipped": 0, "nonfinite": 0})


def test_kinds_that_have_a_fixed_threshold():
    norms = [0.5, 1.5, 3.0]
    assert run(GradientClipping("none", 1.0), norms) == pytest.approx(norms)
    assert run(GradientClipping("global", 2.0), norms) == pytest.approx([0.5, 1.5, 2.0])
    # 0.6 and 0.8 of each norm go to two parameters, each clipped by itself
    expected = [0.5, math.hypot(0.9, 1.0), math.hypot(1.0, 1.0)]
    spectral = GradientClipping("spectral", 1.0)
    assert run(spectral, norms) == pytest.approx(expected)
    assert spectral.clip_fraction == pytest.approx(2 / 3)
    assert spectral.norms == pytest.approx(norms)


def test_no_value_is_read_from_the_device():
    """Values of meta tensors cannot be read."""
    params = with_grads(torch.empty(3, device="meta"), torch.empty(2, 2, device="meta"))
    for kind in ("global", "adaptive", "none"):
        clip = GradientClipping(kind)
        clip(params)
        clip(params)
