"""Schedules: end points, monotony, no wasted step. Scales: published numbers and equal trajectories."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from quintic.core import ConfigError
from quintic.optim import Muon, OptimConfig, convert_lr, lr_factor, momentum_at, scale_factor
from quintic.optim.lr import SCALES


@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(1, 300),
    schedule=st.sampled_from(["wsd", "cosine", "constant"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    shape=st.sampled_from(["linear", "1-sqrt"]),
    final=st.floats(0, 1),
)
def test_every_schedule_rises_stays_and_falls(total, schedule, warmup, decay, shape, final):
    decay = min(decay, 1 - warmup)
    config = OptimConfig(
        schedule=schedule,
        warmup_fraction=warmup,
        decay_fraction=decay,
        decay_shape=shape,
        final_lr_fraction=final,
    )
    f = [lr_factor(step, total, config) for step in range(total)]
    assert all(0 < x <= 1 for x in f)  # no step is wasted, the last one included
    peak = f.index(max(f))
    assert all(a <= b for a, b in itertools.pairwise(f[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(f[peak:]))
    warm = round(warmup * total)
    assert all(x < 1 for x in f[:warm])
    if schedule == "constant":
        assert all(x == 1 for x in f[warm:])
    else:
        assert all(x >= min(final, 1.0) - 1e-12 for x in f[warm:])
        if warm < total:
            assert lr_factor(total, total, config) == final == lr_factor(10 * total, total, config)


def test_wsd_by_hand():
    config = OptimConfig(schedule="wsd", warmup_fraction=0.3, decay_fraction=0.4, decay_shape="linear")
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    assert [lr_factor(step, 10, config) for step in range(10)] == pytest.approx(expected)
    root = OptimConfig(schedule="wsd", warmup_fraction=0.3, decay_fraction=0.4, final_lr_fraction=0.5)
    expected = [0.5 + 0.5 * (1 - math.sqrt(i / 5)) for i in range(1, 5)]
    assert [lr_factor(step, 10, root) for step in range(6, 10)] == pytest.approx(expected)


def test_decay_takes_what_warm_up_leaves_where_rounding_gives_both_a_step():
    config = OptimConfig(warmup_fraction=0.5, decay_fraction=0.5)
    assert [lr_factor(step, 3, config) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1 - 0.5**0.5])


def test_cosine_by_hand():
    config = OptimConfig(schedule="cosine", warmup_fraction=0.0, final_lr_fraction=0.1)
    assert lr_factor(0, 100, config) == 1.0
    assert lr_factor(50, 100, config) == pytest.approx(0.55)
    assert lr_factor(25, 100, config) == pytest.approx(0.1 + 0.9 * (2 + 2**0.5) / 4)
    assert lr_factor(100, 100, config) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak():
    assert lr_factor(0, 1000, OptimConfig(warmup_fraction=0.0)) == 1.0


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
def test_nonsense_steps(step, total):
    with pytest.raises(ConfigError, match="step"):
        lr_factor(step, total, OptimConfig())


def test_scale_factors_of_post_11416():
    assert scale_factor("moonlight", 1024, 256) == scale_factor("moonlight", 256, 1024) == pytest.approx(6.4)
    assert scale_factor("keller", 1024, 256) == 2.0
    assert scale_factor("keller", 256, 1024) == 1.0
    assert scale_factor("mup", 256, 1024) == 0.5
    assert scale_factor("none", 3, 7) == 1.0
    assert scale_factor("rms", 64, 100) == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="did you mean 'keller'"):
        scale_factor("keler", 1, 1)


@pytest.mark.parametrize(("d", "times"), [(1024, 6.4), (2048, 9.05), (4096, 12.8)])
@pytest.mark.parametrize("scale", ["keller", "mup", "none"])
def test_conversion_factors_of_post_11416(d, times, scale):
    lr, wd = convert_lr(1e-3, 0.1, "moonlight", scale, d)
    assert lr == pytest.approx(1e-3 * times, rel=1e-3)
    assert wd == pytest.approx(0.1 / times, rel=1e-3)


@pytest.mark.parametrize("source", SCALES)
@pytest.mark.parametrize("target", SCALES)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_converted_settings_give_the_same_weights(source, target, shape):
    weights = []
    converted = convert_lr(0.03, 0.2, source, target, shape)
    for scale, (lr, wd) in ((source, (0.03, 0.2)), (target, converted)):
        p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = Muon([p], lr=lr, weight_decay=wd, scale=scale, coefficients="exact")
        for step in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights, atol=1e-9, rtol=1e-9)


def test_conversion_refuses_empty_shapes():
    with pytest.raises(ConfigError, match="empty side"):
        convert_lr(1e-3, 0.1, "moonlight", "none", (0, 3))


@pytest.mark.parametrize("shape", [64.0, (64, 32, 3), (64.0, 32), "ab", None, {64, 32}])
def test_conversion_refuses_what_is_no_shape(shape):
    with pytest.raises(ConfigError, match=r"^shape = .*expected \(outputs, inputs\) or a width"):
        convert_lr(1e-3, 0.1, "moonlight", "none", shape)


def test_conversion_takes_widths_and_shapes_as_they_come():
    expected = convert_lr(1e-3, 0.1, "moonlight", "keller", 64)
    for shape in (np.int64(64), (64, 64), [64, 64], torch.zeros(64, 64).shape):
        assert convert_lr(1e-3, 0.1, "moonlight", "keller", shape) == expected


def test_momentum_rises_linearly_and_stays():
    config = OptimConfig(momentum=0.95, momentum_start=0.85, momentum_warmup_fraction=0.1)
    values = [momentum_at(step, 100, config) for step in range(100)]
    assert values[:3] == pytest.approx([0.85, 0.86, 0.87])
    assert values[9] == pytest.approx(0.94)
    assert values[10:] == [0.95] * 90
    assert {momentum_at(step, 100, OptimConfig()) for step in range(100)} == {0.95}


def test_a_changing_momentum_keeps_an_average_of_the_gradients():
    """In the sum form a change of mu would rescale history; a pure function of the step also resumes by itself."""
    config = OptimConfig(momentum=0.9, momentum_start=0.5, momentum_warmup_fraction=0.5)
    p = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = Muon([p], lr=0.1)
    weights = []
    for step in range(8):
        mu = momentum_at(step, 8, config)
        for group in optimizer.param_groups:
            group["momentum"] = mu
        p.grad = torch.full_like(p, float(step))
        weights = [w * mu for w in weights] + [1 - mu]
        optimizer.step()
    expected = sum(w * step for step, w in enumerate(weights))
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full_like(p, expected))
