"""The least-squares triples of post 10592: its whole table, without random samples, and the fit itself."""

import numpy as np
import pytest
from benchmarks.formulas import KELLER, TABLE, sign_error

from quintic.core import ConfigError
from quintic.linalg import fitted_coefficients, msign
from quintic.linalg.coefficients import gaussian_spectrum


@pytest.mark.parametrize(("n", "m", "steps", "triple", "own", "keller"), TABLE)
def test_the_table_of_the_post(n, m, steps, triple, own, keller):
    """The post drew random matrices; quantiles of the law they follow give its numbers within 3e-4."""
    sigma = gaussian_spectrum(n, m)
    assert sign_error(triple, steps, sigma) == pytest.approx(own, abs=3e-4)
    assert sign_error(KELLER, steps, sigma) == pytest.approx(keller, abs=3e-4)
    fitted = fitted_coefficients(m, n, steps)
    assert len(set(fitted)) == 1 and len(fitted) == steps
    found = sign_error(fitted[0], steps, sigma)
    assert found <= sign_error(triple, steps, sigma)
    a, b, c = triple
    if steps == 5:
        assert fitted[0] == pytest.approx(triple, abs=0.03)
    else:  # there the post's form x + k x (x^2 - x1^2) (x^2 - x2^2) with real x1, x2 is at its limit x1 = x2
        assert b * b == pytest.approx(4 * c * (a - 1), rel=2e-3)
    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-3):  # a minimum: no triple nearby is better
        for _ in range(20):
            near = np.array(fitted[0]) * (1 + scale * rng.standard_normal(3))
            assert sign_error(near, steps, sigma) >= found


def test_the_spectrum_is_that_of_gaussian_matrices():
    rng = np.random.default_rng(1)
    for n, m in ((300, 300), (600, 200)):
        sample = np.linalg.svd(rng.standard_normal((n, m)), compute_uv=False)[::-1]
        sample = sample / np.linalg.norm(sample)
        assert np.abs(gaussian_spectrum(n, m) - sample).max() < 0.05 * sample.max()
        assert np.linalg.norm(gaussian_spectrum(n, m)) == pytest.approx(1.0)
        assert np.array_equal(gaussian_spectrum(n, m), gaussian_spectrum(m, n))


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
