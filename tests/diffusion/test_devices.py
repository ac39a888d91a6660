"""Denoisers and samplers compute where the images are, wherever torch puts tensors by default."""

import torch
from tests.devices import meta_by_default

from quintic.diffusion import (
    GaussianDenoiser,
    NetworkDenoiser,
    NoiseSchedule,
    UNet,
    ancestral_sample,
    ddim_sample,
    measure_errors,
)


def test_nothing_follows_the_default_device():
    sizes = {"width": 8, "levels": 1, "blocks": 1, "patch": 1, "heads": 0, "num_classes": 2}
    network = NetworkDenoiser(UNet((1, 4, 4), **sizes, seed=0), "v", {})
    images = torch.randn(20, 1, 4, 4)
    flat = GaussianDenoiser.fit(images, rank=3)
    with meta_by_default():
        for denoiser in (network, flat):
            for sampler in (ddim_sample, ancestral_sample):
                assert sampler(denoiser, 2, NoiseSchedule().grid(3)).device.type == "cpu"
            assert min(measure_errors(denoiser, images, [-1.0, 1.0]).errors) > 0
        assert ddim_sample(network, 2, NoiseSchedule().grid(3), labels=1, guidance=1.0).device.type == "cpu"
