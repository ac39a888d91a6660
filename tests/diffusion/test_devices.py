"""Denoisers and samplers compute where the images are, wherever torch puts tensors by default."""

import pytest
import torch

from quintic.diffusion import (
    GaussianDenoiser,
    NetworkDenoiser,
    NoiseSchedule,
    UNet,
    ancestral_sample,
    ddim_sample,
    measure_errors,
)


@pytest.fixture
def elsewhere():
    """A device of torch's choice on which nothing can be computed."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_nothing_follows_the_default_device(elsewhere):
    with torch.device("cpu"):
        network = NetworkDenoiser(UNet((1, 4, 4), width=8, levels=1, blocks=1, patch=1, heads=0, seed=0), "v", {})
        images = torch.randn(20, 1, 4, 4)
    for denoiser in (network, GaussianDenoiser.fit(images, rank=3)):
        for sampler in (ddim_sample, ancestral_sample):
            assert sampler(denoiser, 2, NoiseSchedule().grid(3)).device.type == "cpu"
        assert min(measure_errors(denoiser, images, [-1.0, 1.0]).errors) > 0
