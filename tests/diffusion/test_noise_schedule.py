"""Schedules against the closed forms of their papers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quintic.core import ConfigError
from quintic.diffusion import NoiseSchedule, alpha_sigma
from quintic.diffusion.noise_schedule import SCHEDULES

TIMES = st.floats(0.01, 0.99)


@given(st.floats(-60, 60))
def test_alpha_and_sigma_lie_on_the_circle_and_give_back_the_level(level):
    alpha, sigma = map(float, alpha_sigma(level))
    assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-12)
    assert math.log(alpha**2 / sigma**2) == pytest.approx(level, rel=1e-9, abs=1e-9)


def test_alpha_sigma_broadcast_against_a_batch():
    x = torch.ones(2, 1, 3, 4)
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 2.0]), x)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert alpha_sigma(0.0, x)[0].shape == ()


@given(TIMES)
def test_cosine_is_a_quarter_of_a_circle(t):
    alpha, sigma = map(float, alpha_sigma(NoiseSchedule("cosine").log_snr(t)))
    assert alpha == pytest.approx(math.cos(math.pi * t / 2), abs=1e-9)
    assert sigma == pytest.approx(math.sin(math.pi * t / 2), abs=1e-9)


def test_linear_is_the_limit_of_ddpm_with_ever_more_steps():
    n = 200_000
    betas = torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * 1000 / n
    products = torch.cumprod(1 - betas, 0)
    schedule = NoiseSchedule("linear", -20, 20)
    for t in (0.1, 0.4, 0.7, 0.99):
        alpha, _ = alpha_sigma(schedule.log_snr(t))
        assert float(alpha) ** 2 == pytest.approx(float(products[int(t * n)]), rel=1e-3)


@given(st.sampled_from(SCHEDULES), TIMES, st.floats(-2, 2))
def test_time_inverts_log_snr(name, t, shift):
    shift = 0.0 if name == "log-snr" else shift
    schedule = NoiseSchedule(name, -30, 30, shift)
    assert schedule.time(schedule.log_snr(t)) == pytest.approx(t, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("levels", [2, 40, 1000])
def test_a_grid_rises_strictly_between_the_ends_at_equal_times(name, levels):
    schedule = NoiseSchedule(name, -8, 7, 0.0 if name == "log-snr" else 2.0)
    grid = schedule.grid(levels)
    assert (grid[0], grid[-1]) == pytest.approx((-8, 7))
    assert all(a < b for a, b in itertools.pairwise(grid))
    times = [schedule.time(level) for level in grid]
    steps = [a - b for a, b in itertools.pairwise(times)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


def test_shift_moves_the_level():
    assert NoiseSchedule("cosine", shift=1.5).log_snr(0.3) == pytest.approx(NoiseSchedule("cosine").log_snr(0.3) + 1.5)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        NoiseSchedule("cosin")
    with pytest.raises(ConfigError, match="minimum < maximum"):
        NoiseSchedule("cosine", 3, 3)
    with pytest.raises(ConfigError, match="shift"):
        NoiseSchedule("log-snr", shift=1.0)
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        NoiseSchedule().log_snr(1.5)
    for levels in (1, -1, 2.5):
        with pytest.raises(ConfigError, match=f"levels = {levels}; expected a whole number, 2 or more"):
            NoiseSchedule().grid(levels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_have_the_precision_and_the_axes_of_what_they_multiply(dtype):
    like = torch.zeros(3, 2, 4, 4, dtype=dtype)
    alpha, sigma = alpha_sigma(torch.tensor([-1.0, 0.0, 2.0]), like)
    assert alpha.dtype == sigma.dtype == dtype and alpha.shape == sigma.shape == (3, 1, 1, 1)
    expected = [1 / math.sqrt(1 + math.exp(-level)) for level in (-1.0, 0.0, 2.0)]
    assert alpha.flatten().tolist() == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)
    assert alpha_sigma(1.0, like)[0].dtype == dtype and alpha_sigma(1.0, like)[0].ndim == 0
