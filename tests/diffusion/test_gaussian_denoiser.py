"""The Gaussian denoiser against Bayes' rule written out with dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintic.core import CheckpointError, ConfigError, DataError
from quintic.diffusion import Denoiser, GaussianDenoiser, alpha_sigma
from quintic.diffusion.denoiser import tensors_fingerprint

SHAPE = (2, 2, 3)
D = 12


def images(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64) * 0.2
    flat = torch.randn(n, D, generator=generator, dtype=torch.float64) @ mix + 0.1
    return flat.view(n, *SHAPE)


def posterior_mean(covariance, mean, x, level):
    """E[x_0 | x] by the normal equations of a linear Gaussian model."""
    alpha, sigma = map(float, alpha_sigma(level))
    precision = torch.linalg.inv(covariance) + alpha**2 / sigma**2 * torch.eye(D, dtype=torch.float64)
    right = torch.linalg.inv(covariance) @ mean[:, None] + alpha / sigma**2 * x.T
    return torch.linalg.solve(precision, right).T


def covariance_of(data):
    flat = data.flatten(1)
    return torch.cov(flat.T) + (2 / 255) ** 2 / 12 * torch.eye(D, dtype=torch.float64), flat.mean(0)


@settings(max_examples=20, deadline=None)
@given(st.floats(-8, 8))
def test_it_is_the_posterior_mean(level):
    data = images()
    model = GaussianDenoiser.fit(data)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = posterior_mean(*covariance_of(data), x.flatten(1).double(), level)
    torch.testing.assert_close(model.predict_x0(x, level).flatten(1).double(), expected, rtol=2e-4, atol=2e-4)


def test_levels_may_differ_within_a_batch():
    model = GaussianDenoiser.fit(images())
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    together = model.predict_x0(x, torch.tensor([-3.0, 0.5, 4.0]))
    for i, level in enumerate((-3.0, 0.5, 4.0)):
        torch.testing.assert_close(together[i : i + 1], model.predict_x0(x[i : i + 1], level))


def test_low_rank_shares_the_variance_of_the_rest():
    data = images()
    covariance, mean = covariance_of(data)
    values, vectors = torch.linalg.eigh(covariance)
    values[: D - 4] = values[: D - 4].mean()
    shared = vectors @ torch.diag(values) @ vectors.T
    model = GaussianDenoiser.fit(data, rank=4)
    assert model.spectrum.sum() == pytest.approx(float(covariance.trace()), rel=1e-6)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = posterior_mean(shared, mean, x.flatten(1).double(), 1.0)
    torch.testing.assert_close(model.predict_x0(x, 1.0).flatten(1).double(), expected, rtol=2e-4, atol=2e-4)


def test_mmse_is_the_measured_error_on_its_own_images():
    data = images(50_000)
    model = GaussianDenoiser.fit(data)
    x0 = data.float()
    for level in (-2.0, 1.0, 4.0):
        alpha, sigma = alpha_sigma(level, x0)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
        error = float((model.predict_x0(x, level) - x0).square().mean())
        assert model.mmse(level) == pytest.approx(error, rel=0.02)


def test_information_grows_by_half_the_error():
    """dI/dSNR = MMSE / 2, Guo, Shamai and Verdu 2005; per unit of log_snr times the SNR."""
    model = GaussianDenoiser.fit(images())
    for level in (-3.0, 0.0, 3.0):
        slope = (model.information(level + 1e-4) - model.information(level - 1e-4)) / 2e-4
        assert slope == pytest.approx(0.5 * math.exp(level) * D * model.mmse(level), rel=1e-4)


def test_it_is_a_denoiser_with_a_stable_fingerprint(tmp_path):
    model = GaussianDenoiser.fit(images())
    assert isinstance(model, Denoiser)
    assert model.shape == SHAPE
    assert model.fingerprint == GaussianDenoiser.fit(images()).fingerprint
    assert model.fingerprint != GaussianDenoiser.fit(images(seed=1)).fingerprint
    assert model.fingerprint != GaussianDenoiser.fit(images(), rank=3).fingerprint
    model.save(tmp_path / "gauss.safetensors")
    again = GaussianDenoiser.load(tmp_path / "gauss.safetensors")
    assert again.fingerprint == model.fingerprint
    x = torch.randn(2, *SHAPE)
    assert torch.equal(again.predict_x0(x, 0.3), model.predict_x0(x, 0.3))
    low = GaussianDenoiser.fit(images(), rank=3)
    low.save(tmp_path / "low.safetensors")
    assert torch.equal(GaussianDenoiser.load(tmp_path / "low.safetensors").spectrum, low.spectrum)


def test_fingerprints_tell_names_types_and_shapes_apart_but_no_order():
    zeros = torch.zeros(4)
    some = {"a": zeros, "b": torch.ones(4)}
    assert tensors_fingerprint(some) == tensors_fingerprint(dict(reversed(some.items())))
    others = [
        tensors_fingerprint({"a": zeros, "b": zeros}),
        tensors_fingerprint({"a": some["b"], "b": zeros}),
        tensors_fingerprint({"a": zeros.int(), "b": some["b"]}),
        tensors_fingerprint({"a": zeros.view(2, 2), "b": some["b"]}),
        tensors_fingerprint(some, "with a description"),
    ]
    assert len({tensors_fingerprint(some), *others}) == 6


def test_directions_have_one_sign_whatever_the_solver_says(monkeypatch):
    expected, solve = GaussianDenoiser.fit(images()), torch.linalg.eigh

    def turned(matrix):
        values, vectors = solve(matrix)
        return values, vectors * torch.tensor([1.0, -1.0] * (D // 2), dtype=vectors.dtype)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert GaussianDenoiser.fit(images()).fingerprint == expected.fingerprint


def test_mistakes_are_named(tmp_path):
    model = GaussianDenoiser.fit(images())
    with pytest.raises(ConfigError, match=r"\(b, 2, 2, 3\), found \(5, 2, 3, 2\)"):
        model.predict_x0(torch.zeros(5, 2, 3, 2), 0.0)
    with pytest.raises(DataError, match="at least 2 images"):
        GaussianDenoiser.fit(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ConfigError, match="between 1 and 12"):
        GaussianDenoiser.fit(images(), rank=13)
    with pytest.raises(ConfigError, match="positive"):
        GaussianDenoiser(torch.zeros(1, 1, 2), torch.eye(2), torch.tensor([1.0, 0.0]))
    (tmp_path / "other").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a file of a Gaussian denoiser"):
        GaussianDenoiser.load(tmp_path / "other")
