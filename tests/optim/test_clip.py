"""Global-norm clipping against float64 arithmetic, at ordinary and extreme magnitudes."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.optim.toy import randn, with_grads
from torch import nn

from quintic.core import ConfigError
from quintic.optim import GradientClipping, clip_grad_norm_, global_norm


def exact_norm(grads):
    return math.sqrt(math.fsum(x * x for g in grads for x in g.double().flatten().tolist()))


def clipped(parameters, max_norm=1.0):
    """What clipping found and did."""
    return GradientClipping("global", max_norm)(parameters)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    exponent=st.integers(-30, 30),
    max_norm=st.sampled_from([1e-3, 0.5, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_matches_exact_arithmetic_at_any_magnitude(shapes, exponent, max_norm, seed):
    grads = [randn(*shape, seed=seed + i) * 10.0**exponent for i, shape in enumerate(shapes)]
    kept = [g.clone() for g in grads]
    result = clipped(with_grads(*grads), max_norm)
    expected = exact_norm(kept)
    assert result.norm.item() == pytest.approx(expected, rel=1e-6)
    assert bool(result.clipped) == (expected > max_norm)
    assert result.scale.item() == pytest.approx(min(1.0, max_norm / expected) if expected else 1.0, rel=1e-6)
    for g, before in zip(grads, kept, strict=True):
        if result.clipped:
            torch.testing.assert_close(g.double(), before.double() * result.scale.item(), rtol=1e-6, atol=0)
        else:
            assert torch.equal(g, before)


@pytest.mark.parametrize("value", [1e20, 3e38])
def test_huge_gradients_are_clipped_and_not_zeroed(value):
    (p,) = with_grads(torch.full((8,), value))
    result = clipped(p)
    assert bool(result.finite)
    torch.testing.assert_close(p.grad, torch.full((8,), 8**-0.5), rtol=1e-5, atol=0)


def test_tiny_gradients_have_a_norm():
    (p,) = with_grads(torch.full((4,), 1e-30))
    assert clip_grad_norm_(p).item() == pytest.approx(2e-30, rel=1e-6)
    assert torch.equal(p.grad, torch.full((4,), 1e-30))
    (p,) = with_grads(torch.full((4,), 1e-30))
    clip_grad_norm_(p, 1e-30)
    torch.testing.assert_close(p.grad, torch.full((4,), 5e-31), atol=0, rtol=1e-6)


def test_extremes_of_float64():
    for value in (1e200, 1e-200):
        (p,) = with_grads(torch.full((4,), value, dtype=torch.float64))
        assert clip_grad_norm_(p).item() == pytest.approx(2 * value)


def test_a_norm_beyond_float64_is_not_finite_and_nothing_is_changed():
    (p,) = with_grads(torch.full((8,), 1.7e308, dtype=torch.float64))
    result = clipped(p)
    assert not result.finite
    assert torch.equal(p.grad, torch.full((8,), 1.7e308, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """A bfloat16 sum of 2**16 equal squares would stop at 256 of them."""
    (p,) = with_grads(torch.full((2**16,), 0.5, dtype=dtype))
    result = clipped(p)
    assert result.norm.item() == pytest.approx(128.0, rel=1e-5)
    assert p.grad.dtype == dtype
    torch.testing.assert_close(p.grad.float(), torch.full((2**16,), 1 / 256))


def test_mixed_dtypes():
    params = with_grads(randn(5), randn(4, dtype=torch.float64), randn(6).bfloat16())
    expected = exact_norm([p.grad for p in params])
    assert clip_grad_norm_(params, 0.1).item() == pytest.approx(expected, rel=1e-6)
    assert exact_norm([p.grad for p in params]) == pytest.approx(0.1, rel=5e-3)


def test_a_parameter_listed_twice_counts_and_is_scaled_once():
    p, q = with_grads(torch.tensor([3.0]), torch.tensor([4.0]))
    result = clipped([p, q, p])
    assert result.norm.item() == pytest.approx(5.0)
    assert p.grad.item() == pytest.approx(0.6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_norm_is_reported_and_nothing_is_changed(bad):
    p, q = with_grads(torch.tensor([3.0, bad]), torch.tensor([4.0]))
    result = clipped([p, q])
    assert not result.finite
    assert not result.clipped
    assert not result.norm.isfinite()
    assert result.scale == 1
    assert torch.equal(p.grad.nan_to_num(7.0), torch.tensor([3.0, bad]).nan_to_num(7.0))
    assert q.grad.item() == 4.0


def test_inputs():
    model = nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), 2.0)  # the bias has none
    assert clip_grad_norm_(model, float("inf")).item() == pytest.approx(24**0.5)
    assert model.weight.grad.max() == 2.0
    assert clipped(model.parameters(), 1.0).clipped
    assert clip_grad_norm_([]) == 0
    assert clip_grad_norm_(nn.Parameter(torch.zeros(3))) == 0
    assert global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)


def test_no_value_is_read_from_the_device():
    params = with_grads(torch.empty(3, device="meta"), torch.empty(2, 2, device="meta"))
    clip_grad_norm_(params)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), None, "1"])
def test_wrong_threshold(max_norm):
    with pytest.raises(ConfigError, match="positive"):
        clip_grad_norm_([], max_norm)


def test_what_is_no_tensor_and_complex_gradients_are_refused():
    with pytest.raises(ConfigError, match=r"cannot clip tuple.*parameters\(\)"):
        clip_grad_norm_(nn.Linear(2, 2).named_parameters())
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match=r"parameter 0 is of torch\.complex64"):
        clip_grad_norm_(p)


def test_sparse_gradients_are_refused():
    (p,) = with_grads(torch.zeros(3, 2))
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        clip_grad_norm_(p)


def test_a_small_scale_is_not_lost_in_half_precision():
    p = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    p.grad = torch.full((8,), 6e4, dtype=torch.float16)
    clip_grad_norm_(p, 1e-3)  # by 6e-9, which float16 does not have
    torch.testing.assert_close(p.grad, torch.full((8,), 1e-3 / 8**0.5, dtype=torch.float16))


def test_gradients_of_two_precisions_keep_each_its_own():
    p, q = with_grads(torch.ones(3, dtype=torch.float64), torch.ones(4))
    clip_grad_norm_([p, q], 1.0)
    torch.testing.assert_close(p.grad, torch.full((3,), 7**-0.5, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(q.grad, torch.full((4,), 7**-0.5))


def test_gradients_of_one_sign_beyond_the_range_of_squares():
    for value in (1e30, -1e30):
        (p,) = with_grads(torch.full((4,), value))
        assert clip_grad_norm_(p) == pytest.approx(2e30)
        torch.testing.assert_close(p.grad, torch.full((4,), math.copysign(0.5, value)))


def test_it_takes_the_place_of_torchs():
    """In loops that print, compare and collect the norm."""
    shapes, norms = [(5, 3), (7,), ()], []
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    for scale in (0.1, 10.0):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = randn(*p.shape, seed=i) * scale
            q.grad = p.grad.clone()
        norm = clip_grad_norm_(ours, max_norm=2.0)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm=2.0)
        assert norm.shape == () and norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert f"{norm:.2f}" == f"{expected:.2f}" and (norm > 2.0) == (expected > 2.0)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=0)  # torch adds 1e-6 to the norm
        norms.append(norm)
    assert torch.stack(norms).mean() > 1.0
