"""Samplers with an exact denoiser must give back its Gaussian."""

import math

import pytest
import torch

from quintic.core import ConfigError
from quintic.diffusion import GaussianDenoiser, NoiseSchedule, alpha_sigma, ancestral_sample, ddim_sample, reverse_step
from quintic.diffusion.samplers import seeded_noise

MEAN = torch.tensor([0.3, -0.2, 0.0, 0.5])
VARIANCES = torch.tensor([0.5, 0.2, 0.05, 0.01])


def gaussian():
    basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    return GaussianDenoiser(MEAN.view(1, 2, 2), basis, VARIANCES), basis @ torch.diag(VARIANCES) @ basis.T


@pytest.mark.parametrize("sampler", [ancestral_sample, ddim_sample])
def test_samples_have_the_mean_and_the_covariance(sampler):
    model, covariance = gaussian()
    generator = torch.Generator().manual_seed(1)
    n = 10_000
    levels = NoiseSchedule("log-snr", -12, 12).grid(1000)
    drawn = sampler(model, n, levels, noise=lambda _: torch.randn(n, 1, 2, 2, generator=generator), clip=False)
    flat = drawn.flatten(1)
    assert (flat.mean(0) - MEAN).abs().max() < 4 * math.sqrt(0.5 / n) + 0.005
    # A thousand levels leave an error of about one percent, ten thousand samples another.
    assert torch.linalg.norm(torch.cov(flat.T) - covariance) < 0.04 * torch.linalg.norm(covariance)


@pytest.mark.parametrize(("level", "following"), [(-6.0, -5.0), (-1.0, 2.0), (3.0, 9.0)])
def test_a_reverse_step_is_the_bayes_posterior(level, following):
    """q(x_t | x_s, x_0) from the product of q(x_s | x_t) and q(x_t | x_0)."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (tuple(map(float, alpha_sigma(v))) for v in (level, following))
    ratio = alpha_s / alpha_t
    noise = sigma_s**2 - ratio**2 * sigma_t**2
    precision = ratio**2 / noise + 1 / sigma_t**2
    a, b, std = reverse_step(level, following)
    assert std**2 == pytest.approx(1 / precision, rel=1e-9)
    assert a == pytest.approx(ratio / noise / precision, rel=1e-9)
    assert b == pytest.approx(alpha_t / sigma_t**2 / precision, rel=1e-9)


def test_images_depend_on_seed_and_number_alone():
    model, _ = gaussian()
    levels = NoiseSchedule().grid(8)
    for sampler in (ancestral_sample, ddim_sample):
        few, many = sampler(model, 2, levels, seed=5), sampler(model, 5, levels, seed=5)
        torch.testing.assert_close(few, many[:2])
        assert not torch.allclose(few, sampler(model, 2, levels, seed=6))


def test_no_number_of_the_noise_is_used_twice():
    noise = seeded_noise(3, 4, (2, 3, 5))
    drawn = torch.cat([noise(step).flatten() for step in range(6)])
    assert len(drawn.unique()) == len(drawn) == 6 * 4 * 30
    assert drawn.mean().abs() < 0.1 and drawn.std() == pytest.approx(1.0, abs=0.1)


def test_ddim_uses_noise_once_and_ancestral_at_every_step():
    model, _ = gaussian()
    asked = []

    def noise(step):
        asked.append(step)
        return seeded_noise(0, 3, model.shape)(step)

    levels = NoiseSchedule().grid(6)
    ddim_sample(model, 3, levels, noise=noise)
    assert asked == [0]
    asked.clear()
    ancestral_sample(model, 3, levels, noise=noise)
    assert asked == [0, 1, 2, 3, 4, 5]  # the last level ends with the prediction


def test_clipping_bounds_the_images():
    wide = GaussianDenoiser(torch.zeros(1, 1, 1), torch.eye(1), torch.tensor([9.0]))
    levels = NoiseSchedule().grid(10)
    assert ancestral_sample(wide, 50, levels).abs().max() <= 1.0
    assert ancestral_sample(wide, 50, levels, clip=False).abs().max() > 1.0


def test_mistakes_are_named():
    model, _ = gaussian()
    with pytest.raises(ConfigError, match="must rise"):
        ddim_sample(model, 1, [1.0, 0.0])
    for levels in ([], [0.0, 0.0], [0.0, math.inf], [-math.inf, 0.0], [math.nan]):
        with pytest.raises(ConfigError, match="must rise"):
            ddim_sample(model, 1, levels)
    with pytest.raises(ConfigError, match="count = 0; expected a whole number, 1 or more"):
        ddim_sample(model, 0, [0.0])
    with pytest.raises(ConfigError, match="larger log_snr"):
        reverse_step(1.0, 1.0)
