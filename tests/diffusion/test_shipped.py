"""The models that come with the package: small, with a true card, and good at denoising what they know."""

import re

import pytest
import torch

from quintic.assets import weights_path
from quintic.core import ConfigError
from quintic.core.files import sha256_file
from quintic.diffusion import NoiseSchedule, alpha_sigma, ddim_sample, shipped_denoiser, shipped_names


def test_fashion_is_among_them():
    assert "fashion28" in shipped_names()
    assert shipped_denoiser("fashion28").shape == (1, 28, 28)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'fashion28'"):
        shipped_denoiser("fashion")


@pytest.mark.parametrize("name", shipped_names())
def test_the_card_is_true_and_the_file_small(name):
    file = weights_path("ddpm", name)
    card = file.with_suffix(".md").read_text(encoding="utf-8")
    assert file.stat().st_size <= 6_000_000
    assert sha256_file(file) in card
    assert shipped_denoiser(name).fingerprint in card
    for word in ("licence of the images", "validation loss", "training", "quintic train"):
        assert word in card
    assert file.with_suffix(".png").is_file()
    assert not re.search(r"/tmp|/home|/work", card)


@pytest.mark.parametrize("name", shipped_names())
def test_it_takes_the_noise_off_its_own_samples(name):
    """Samples are clean images as the model knows them, so its measured errors must hold on them, roughly."""
    model = shipped_denoiser(name)
    samples = ddim_sample(model, 8, NoiseSchedule("cosine", -9, 10, 2.0).grid(15))
    assert samples.std() > 0.2 and (samples[0] - samples[1]).abs().mean() > 0.05
    for level in (0.0, 3.0):
        alpha, sigma = alpha_sigma(level, samples)
        noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
        error = float((model.predict_x0(alpha * samples + sigma * noise, level) - samples).square().mean())
        assert model.curve.mmse(level) / 4 < error < 4 * model.curve.mmse(level)
