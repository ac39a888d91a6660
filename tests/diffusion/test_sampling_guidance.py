"""Classes and guidance in samplers: against a computation by hand, and nothing changes without them."""

import math

import pytest
import torch

from quintic.core import ConfigError
from quintic.diffusion import (
    GaussianDenoiser,
    NetworkDenoiser,
    NoiseSchedule,
    UNet,
    ancestral_sample,
    ddim_sample,
    reverse_step,
)
from quintic.diffusion.stepwise import StepwiseDenoiser

LEVELS = [-2.0, 0.5, 3.0]
SHIFTS = torch.tensor([0.3, -0.2, 0.1])  # of class 0, class 1 and none


class Shifts:
    """Predicts x / 2 and something that the class adds."""

    shape = (1, 1, 2)
    fingerprint = "0"
    num_classes = 2

    def predict_x0(self, x, log_snr, labels=None):
        rows = torch.full((len(x),), -1) if labels is None else labels
        return 0.5 * x + SHIFTS[rows].view(-1, 1, 1, 1)  # -1 is the last one


@pytest.mark.parametrize("sampler", [ddim_sample, ancestral_sample])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_every_step_goes_to_the_guided_prediction(sampler, guidance):
    labels = [0, 1, -1, 1]
    drawn = torch.randn(len(LEVELS), 4, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    found = sampler(
        Shifts(), 4, LEVELS, labels=torch.tensor(labels), guidance=guidance, noise=lambda step: drawn[step], clip=False
    )
    for image, label in enumerate(labels):
        # As (1 + w) of the one prediction minus w of the other, number by number.
        told = (1 + guidance) * float(SHIFTS[label]) - guidance * float(SHIFTS[-1])
        for pixel in range(2):
            z = [float(v) for v in drawn[:, image, 0, 0, pixel]]
            x = z[0]
            for step, level in enumerate(LEVELS):
                x0 = 0.5 * x + told
                if step + 1 == len(LEVELS):
                    break
                if sampler is ancestral_sample:
                    a, b, std = reverse_step(level, LEVELS[step + 1])
                    x = a * x + b * x0 + std * z[step + 1]
                else:
                    (alpha, sigma), (alpha_t, sigma_t) = (
                        (math.sqrt(1 / (1 + math.exp(-v))), math.sqrt(1 / (1 + math.exp(v))))
                        for v in (level, LEVELS[step + 1])
                    )
                    x = alpha_t * x0 + sigma_t * (x - alpha * x0) / sigma
            assert float(found[image, 0, 0, pixel]) == pytest.approx(x0, abs=1e-5)


def network():
    arguments = {"shape": (1, 4, 4), "width": 8, "levels": 1, "blocks": 1, "patch": 1, "heads": 0, "num_classes": 3}
    net = UNet(**arguments, seed=0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return NetworkDenoiser(net, "v", arguments)


@pytest.mark.parametrize("sampler", [ddim_sample, ancestral_sample])
def test_a_network_is_told_the_class_of_each_image(sampler):
    denoiser, levels = network(), NoiseSchedule().grid(4)
    free = sampler(denoiser, 4, levels)
    assert torch.equal(sampler(denoiser, 4, levels, labels=-1), free)
    by_class = [sampler(denoiser, 4, levels, labels=label, guidance=0.5) for label in range(3)]
    assert not any(torch.allclose(one, free) for one in by_class)
    mixed = sampler(denoiser, 4, levels, labels=torch.tensor([2, 0, -1, 1]), guidance=0.5)
    expected = torch.stack([by_class[2][0], by_class[0][1], free[2], by_class[1][3]])
    torch.testing.assert_close(mixed, expected)


def test_the_class_of_a_gaussian_is_what_is_drawn():
    """Of two exact denoisers, one for each class, samples have the mean of the class that was asked for."""
    means = [torch.full((1, 2, 2), 0.4), torch.full((1, 2, 2), -0.6)]
    of_class = [GaussianDenoiser(mean, torch.eye(4), torch.full((4,), 0.01)) for mean in means]

    class Two:
        shape, fingerprint, num_classes = (1, 2, 2), "0", 2

        def predict_x0(self, x, log_snr, labels=None):
            every = torch.stack([one.predict_x0(x, log_snr) for one in of_class])
            return every[labels, torch.arange(len(x))]

    found = ancestral_sample(Two(), 400, NoiseSchedule().grid(50), labels=torch.arange(400) % 2)
    assert found[::2].mean() == pytest.approx(0.4, abs=0.03)
    assert found[1::2].mean() == pytest.approx(-0.6, abs=0.03)


def test_labels_that_mean_nothing_are_refused():
    flat = GaussianDenoiser(torch.zeros(1, 2, 2), torch.eye(4), torch.full((4,), 0.1))
    for labels in (0, -1, torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="a denoiser without classes"):
            ddim_sample(flat, 2, LEVELS, labels=labels)
    denoiser = network()
    for labels in (3, -2, torch.tensor([0, 3])):
        with pytest.raises(ConfigError, match="labels are 0 to 2, or -1 for none; found"):
            ddim_sample(denoiser, 2, LEVELS, labels=labels)
        with pytest.raises(ConfigError, match="labels are 0 to 2, or -1 for none; found"):
            denoiser.predict_x0(torch.zeros(2, 1, 4, 4), 0.0, torch.as_tensor(labels).expand(2))
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(ConfigError, match="expected 2 whole numbers as labels, found"):
            ddim_sample(denoiser, 2, LEVELS, labels=labels)
    for guidance in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="guidance weight must be 0 or more"):
            ddim_sample(denoiser, 2, LEVELS, labels=0, guidance=guidance)
    with pytest.raises(ConfigError, match="guidance needs classes to go to"):
        ddim_sample(denoiser, 2, LEVELS, guidance=1.0)
    foreign = StepwiseDenoiser(lambda x, step, labels: x, [0.9, 0.5, 0.1], "eps", (1, 4, 4), "0", num_classes=3)
    with pytest.raises(ConfigError, match="labels are 0 to 2; found -1 to -1"):
        ddim_sample(foreign, 2, LEVELS, labels=-1)
    assert ddim_sample(foreign, 2, LEVELS, labels=2).shape == (2, 1, 4, 4)
