"""Measured error curves against the Gaussian's closed forms."""

import pytest
import torch

from quintic.core import ConfigError, DataError
from quintic.diffusion import ErrorCurve, GaussianDenoiser, NetworkDenoiser, UNet, load_denoiser, measure_errors
from quintic.diffusion.residuals import measure_residuals

LEVELS = [-8 + 0.5 * i for i in range(33)]


@pytest.fixture(scope="module")
def gaussian():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    variances = torch.logspace(-3, 0, 12)
    model = GaussianDenoiser(torch.zeros(1, 3, 4), basis, variances)
    images = (torch.randn(4000, 12, generator=generator) * variances.sqrt()) @ basis.T
    return model, images.view(-1, 1, 3, 4)


@pytest.fixture(scope="module")
def curve(gaussian):
    return measure_errors(*gaussian, LEVELS, batch=1500)


def test_the_measured_curve_is_that_of_the_closed_form(gaussian, curve):
    model, _ = gaussian
    for level in (-5.0, -0.25, 3.0, 7.9):
        assert curve.mmse(level) == pytest.approx(model.mmse(level), rel=0.05)
        assert curve.information(level) == pytest.approx(model.information(level), rel=0.05)


def test_the_integral_is_exact_for_the_true_errors(gaussian):
    model, _ = gaussian
    curve = ErrorCurve(tuple(LEVELS), tuple(model.mmse(level) for level in LEVELS), 12)
    for level in (-20.0, -8.0, -3.3, 0.0, 6.1, 8.0):
        assert curve.information(level) == pytest.approx(model.information(level), rel=0.01)


def test_a_better_denoiser_has_less_to_send(gaussian, curve):
    model, images = gaussian
    blunt = GaussianDenoiser(torch.zeros(1, 3, 4), torch.eye(12), torch.full((12,), float(model.spectrum.mean())))
    assert measure_errors(blunt, images, LEVELS, batch=4000).information(6.0) > 1.2 * curve.information(6.0)


def test_the_batch_does_not_matter(gaussian):
    model, images = gaussian
    one, two = (measure_errors(model, images[:50], [0.0, 1.0], batch=batch) for batch in (50, 7))
    assert one.errors == pytest.approx(two.errors, rel=1e-6)


def test_a_curve_stays_with_its_network(tmp_path):
    arguments = {"shape": (1, 4, 4), "width": 8, "levels": 1, "blocks": 1, "patch": 1, "heads": 0}
    curve = ErrorCurve((-1.0, 1.0), (0.5, 0.25), 16)
    NetworkDenoiser(UNet(**arguments, seed=0), "v", arguments, curve).save(tmp_path / "net.safetensors")
    again = load_denoiser(tmp_path / "net.safetensors")
    assert again.curve == curve


def test_curves_that_cannot_be_are_refused():
    for levels, errors in (((0.0,), (1.0,)), ((1.0, 0.0), (1.0, 1.0)), ((0.0, 1.0), (1.0, 0.0)), ((0.0, 1.0), (1.0,))):
        with pytest.raises(ConfigError):
            ErrorCurve(levels, errors, 4)
    with pytest.raises(ConfigError, match="values > 0"):
        ErrorCurve((0.0, 1.0), (1.0, 0.5), 0)


@pytest.mark.parametrize(
    "measure", [lambda *given, **more: measure_errors(*given, [0.0, 1.0], **more), measure_residuals]
)
def test_a_measurement_of_nothing_is_refused(gaussian, measure):
    model, images = gaussian
    for batch in (0, -1):
        with pytest.raises(ConfigError, match=f"batch = {batch}; expected a whole number, 1 or more"):
            measure(model, images[:3], batch=batch)
    with pytest.raises(DataError, match="one image or more, found none"):
        measure(model, images[:0])
