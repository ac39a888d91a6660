"""Denoisers and samplers compute where the images are, wherever torch puts tensors by default."""

import torch
from tests.devices import NARROW, meta_by_default, without_float64

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


def test_errors_are_measured_where_the_images_are_without_float64_there(monkeypatch):
    flat = GaussianDenoiser.fit(torch.randn(20, 1, 4, 4), rank=3)
    asked = []

    class Spy:
        shape = flat.shape

        def predict_x0(self, x, log_snr):
            asked.append(x.device)
            return flat.predict_x0(x, log_snr)

    with without_float64(monkeypatch):
        GaussianDenoiser.fit(torch.zeros(20, 1, 4, 4, device=NARROW))
    with without_float64(monkeypatch):
        images = torch.zeros(20, 1, 4, 4, device=NARROW)
        assert flat.predict_x0(images, 0.0).device == NARROW
        measure_errors(Spy(), images, [-1.0, 1.0])
    assert asked and set(asked) == {NARROW}
