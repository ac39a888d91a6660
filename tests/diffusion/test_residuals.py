"""Tables of a denoiser's errors, against covariances written out densely."""

import math

import numpy as np
import pytest
import torch

from quintic.core import ConfigError
from quintic.diffusion import ErrorCurve, GaussianDenoiser, NetworkDenoiser, UNet, load_denoiser
from quintic.diffusion.residuals import (
    KNOTS,
    PARTS,
    Residuals,
    band_of,
    gaussian_residuals,
    measure_residuals,
    part_of,
    transforms,
)


def model(channels=1, height=5, width=6, rank=None):
    """Gaussian images, not diagonal in cosines."""
    d = channels * height * width
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    variances = torch.logspace(-3, 0, d, dtype=torch.float64).flip(0)
    rest = 1e-3 if rank is None else float(variances[rank:].mean())
    return GaussianDenoiser(torch.zeros(channels, height, width), basis[:, :rank], variances[:rank], rest)


def cosines(side):
    rows = [[math.cos(math.pi * k * (2 * i + 1) / (2 * side)) for i in range(side)] for k in range(side)]
    return np.array([np.array(row) / math.hypot(*row) for row in rows])


def expected_bands(denoiser, level):
    """Mean squares of the error's cosine transform, from the dense covariance of the error."""
    c, h, w = denoiser.shape
    rank = denoiser.basis.shape[1]
    basis, spectrum = denoiser.basis.double().numpy(), denoiser.spectrum.numpy()
    prior = basis @ np.diag(spectrum[:rank]) @ basis.T
    prior += (spectrum[-1] if rank < c * h * w else 0.0) * (np.eye(c * h * w) - basis @ basis.T)
    error = np.linalg.inv(np.linalg.inv(prior) + math.exp(level) * np.eye(c * h * w))
    colours = np.eye(1)
    if c == 3:
        colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    turn = np.kron(np.kron(colours, cosines(h)), cosines(w))
    squares = np.diag(turn @ error @ turn.T).reshape(c, h, w) / (np.trace(error) / (c * h * w))
    starts = [0, 1, 2, 3, 4, 6, 8]
    ends = [*starts[1:], 99]
    return [
        squares[k, a:b, p:q].mean()
        for k in range(c)
        for a, b in zip(starts, ends, strict=True)
        if a < h
        for p, q in zip(starts, ends, strict=True)
        if p < w
    ]


@pytest.mark.parametrize("channels,rank", [(1, None), (1, 7), (3, None)])
def test_those_of_a_gaussian_are_its_posterior_covariance(channels, rank):
    denoiser = model(channels, rank=rank)
    tables = gaussian_residuals(denoiser)
    assert set(tables.sizes) == {(256,) * PARTS}
    for level, row in zip(KNOTS, tables.bands, strict=True):
        np.testing.assert_allclose(np.array(row) / 256, expected_bands(denoiser, level), rtol=1e-4, atol=0.6 / 256)


def test_measured_ones_are_those_of_the_closed_form():
    denoiser = model()
    normal = torch.randn(3000, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = 0.2 * (normal * denoiser.spectrum.sqrt()) @ denoiser.basis.double().T
    small = GaussianDenoiser(torch.zeros(1, 5, 6), denoiser.basis, 0.04 * denoiser.spectrum)
    measured = measure_residuals(small, images.view(-1, 1, 5, 6).float(), batch=1300)
    for level, row in zip(KNOTS, measured.bands, strict=True):
        np.testing.assert_allclose(np.array(row) / 256, expected_bands(small, level), rtol=0.1, atol=0.01)


class Known:
    """Predicts a half of a picture with small errors, the other with errors thrice as large."""

    shape, fingerprint = (1, 4, 4), "known"

    def __init__(self, images):
        side = torch.where(torch.arange(4) < 2, -0.5, 0.5)
        errors = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        self.said = side.expand(images.shape)
        images[:] = self.said + 0.02 * torch.where(side > 0, 3.0, 1.0) * errors

    def predict_x0(self, x, log_snr):
        return self.said


def test_sizes_follow_the_predicted_value():
    images = torch.zeros(2000, 1, 4, 4)
    tables = measure_residuals(Known(images), images, batch=2000)
    small, large = part_of(np.array([-0.5, 0.5]))
    for sizes, bands in zip(tables.sizes, tables.bands, strict=True):
        assert sizes[large] / sizes[small] == pytest.approx(3.0, rel=0.05)
        assert sizes[small] / 256 == pytest.approx(1 / math.sqrt(5), rel=0.05)
        assert {n for i, n in enumerate(sizes) if i not in (small, large)} == {256}
        np.testing.assert_allclose(np.array(bands) / 256, 1.0, atol=0.1)  # white once their size is taken out


def test_bands_are_those_of_errors_of_one_size():
    """Errors alike all over a picture, but thrice as large in one half: what is left without the size is one number."""
    images = torch.zeros(3000, 1, 4, 4)
    known = Known(images)
    one = torch.randn(3000, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    images[:] = known.said + 0.02 * torch.where(known.said > 0, 3.0, 1.0) * one
    for row in measure_residuals(known, images, batch=3000).bands:
        assert row[0] / 256 == pytest.approx(16.0, rel=0.05) and max(row[1:]) <= 3


def test_a_band_without_errors_has_the_smallest_number():
    squares = np.full((1, 4, 4), 1e-6)
    squares[0, 0, 0] = 16.0
    tables = Residuals.from_squares([np.ones(PARTS)] * len(KNOTS), [squares] * len(KNOTS))
    assert set(tables.bands[0]) == {16 * 256, 1}


def test_what_is_predicted_beyond_the_range_counts_as_its_end():
    images = 0.5 * torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    loud, clipped = Known(images.clone()), Known(images.clone())
    loud.said = 3.0 * loud.said
    clipped.said = 2.0 * clipped.said  # -1 and 1
    assert measure_residuals(loud, images, batch=200) == measure_residuals(clipped, images, batch=200)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 5, 12)])
def test_transforms_are_orthogonal_and_their_entries_lie_far_from_ties(shape):
    for matrix, exact in zip(transforms(shape), (None, cosines(shape[1]), cosines(shape[2])), strict=True):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)
        assert (matrix * 2**20 == np.rint(matrix * 2**20)).all()
        if exact is not None:
            away = np.abs(exact * 2**20 - np.floor(exact * 2**20) - 0.5)
            assert away.min() > 1e-7  # a libm that is off by a few last bits rounds to the same
            assert (np.rint(exact * 2**20) == matrix * 2**20).all()


def test_parts_and_bands():
    assert part_of(np.array([-1.0, -0.91, -0.9, 0.0, 0.99, 1.0])).tolist() == [0, 0, 1, 10, 20, 20]
    assert band_of(26).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, *[8] * 8, 9, 9]


def test_they_stay_with_their_network(tmp_path):
    arguments = {"shape": (1, 4, 4), "width": 8, "levels": 1, "blocks": 1, "patch": 1, "heads": 0}
    tables = gaussian_residuals(model(1, 4, 4))
    curve = ErrorCurve((-1.0, 1.0), (0.5, 0.25), 16, tables)
    NetworkDenoiser(UNet(**arguments, seed=0), "v", arguments, curve).save(tmp_path / "net.safetensors")
    again = load_denoiser(tmp_path / "net.safetensors").curve.residuals
    assert again == tables and again.digest == tables.digest
    assert gaussian_residuals(model(1, 4, 4, rank=2)).digest != tables.digest


def test_tables_that_cannot_be_are_refused():
    good = gaussian_residuals(model())
    for sizes, bands in (
        (good.sizes[1:], good.bands),
        (good.sizes, good.bands[1:]),
        (tuple(row[1:] for row in good.sizes), good.bands),
        (good.sizes, (good.bands[0][1:], *good.bands[1:])),
        (((0,) * PARTS, *good.sizes[1:]), good.bands),
    ):
        with pytest.raises(ConfigError, match="residuals"):
            Residuals(sizes, bands)
