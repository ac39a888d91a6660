"""The least-squares triples of post 10592: its whole table, without random samples, and the fit itself."""

import numpy as np
import pytest

from quintic.core import ConfigError
from quintic.linalg import fitted_coefficients, msign
from quintic.linalg.coefficients import gaussian_spectrum

KELLER = (3.4445, -4.7750, 2.0315)
TABLE = [  # rows, columns, steps, the post's triple, its error, Keller's error
    (1024, 1024, 3, (4.328, -9.666, 7.020), 0.10257, 0.18278),
    (2048, 1024, 3, (4.095, -9.327, 7.028), 0.01628, 0.06171),
    (4096, 1024, 3, (3.886, -8.956, 6.948), 0.00371, 0.02574),
    (2048, 2048, 3, (4.857, -13.103, 11.130), 0.10739, 0.24410),
    (4096, 4096, 3, (5.460, -17.929, 18.017), 0.11303, 0.33404),
    (8192, 8192, 3, (6.139, -24.893, 30.147), 0.11944, 0.44843),
    (1024, 1024, 5, (3.297, -4.136, 1.724), 0.02733, 0.04431),
    (2048, 1024, 5, (2.644, -3.128, 1.476), 0.00038, 0.02954),
    (4096, 1024, 5, (2.461, -2.663, 1.214), 0.00008, 0.02563),
    (2048, 2048, 5, (3.333, -4.259, 1.779), 0.03516, 0.04991),
    (4096, 4096, 5, (3.373, -4.613, 2.057), 0.04700, 0.06372),
    (8192, 8192, 5, (3.389, -4.902, 2.310), 0.05869, 0.07606),
]


def error(triple, steps, sigma):
    a, b, c = triple
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return np.mean((sigma - 1) ** 2)


@pytest.mark.parametrize(("n", "m", "steps", "triple", "own", "keller"), TABLE)
def test_the_table_of_the_post(n, m, steps, triple, own, keller):
    """The post drew random matrices; quantiles of the law they follow give its numbers within 3e-4."""
    sigma = gaussian_spectrum(n, m)
    assert error(triple, steps, sigma) == pytest.approx(own, abs=3e-4)
    assert error(KELLER, steps, sigma) == pytest.approx(keller, abs=3e-4)
    fitted = fitted_coefficients(m, n, steps)
    assert len(set(fitted)) == 1 and len(fitted) == steps
    found = error(fitted[0], steps, sigma)
    assert found <= error(triple, steps, sigma)
    a, b, c = triple
    if steps == 5:
        assert fitted[0] == pytest.approx(triple, abs=0.03)
    else:  # there the post's form x + k x (x^2 - x1^2) (x^2 - x2^2) with real x1, x2 is at its limit x1 = x2
        assert b * b == pytest.approx(4 * c * (a - 1), rel=2e-3)
    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-3):  # a minimum: no triple nearby is better
        for _ in range(20):
            near = np.array(fitted[0]) * (1 + scale * rng.standard_normal(3))
            assert error(near, steps, sigma) >= found


def test_the_spectrum_is_that_of_gaussian_matrices():
    rng = np.random.default_rng(1)
    for n, m in ((300, 300), (600, 200)):
        sample = np.linalg.svd(rng.standard_normal((n, m)), compute_uv=False)[::-1]
        sample = sample / np.linalg.norm(sample)
        assert np.abs(gaussian_spectrum(n, m) - sample).max() < 0.05 * sample.max()
        assert np.linalg.norm(gaussian_spectrum(n, m)) == pytest.approx(1.0)


def test_a_fit_is_a_schedule_for_msign():
    import torch

    M = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(msign(M, coefficients=fitted_coefficients(96, 32)))
    assert (sigma - 1).square().mean() < 1e-3


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="no singular values"):
        fitted_coefficients(0, 3)
    for steps in (0, 101, 2.5, True):
        with pytest.raises(ConfigError, match="from 1 to 100"):
            fitted_coefficients(4, 4, steps)
