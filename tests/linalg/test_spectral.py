"""The spectral norm and its gradient against the SVD, finite differences and explicit convolution matrices."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.lowrank.matrices import randn, with_spectrum
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.linalg.spectral import (
    conv_spectral_norm,
    gaussian_start,
    spectral_norm,
    spectral_norm_grad,
    top_singular,
)

METHODS = ["power", "lanczos", "svd"]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    method=st.sampled_from(METHODS),
    exponent=st.sampled_from([-300, -150, 0, 150, 300]),
    seed=st.integers(0, 99),
)
def test_equals_the_svd_over_shapes_and_scales(n, m, method, exponent, seed):
    A = with_spectrum(n, m, [0.6**i for i in range(min(n, m))], seed)
    got = spectral_norm(A * 10.0**exponent, method=method, iterations=60)
    assert got.item() / 10.0**exponent == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_is_a_lower_bound_that_rises_with_the_iterations(method):
    A = randn(40, 30)
    true = torch.linalg.svdvals(A)[0].item()
    estimates = [spectral_norm(A, method=method, iterations=i).item() for i in (1, 3, 10, 60)]
    assert estimates == sorted(estimates)
    assert all(e <= true * (1 + 1e-12) for e in estimates)
    assert estimates[0] < 0.99 * true  # else this test says nothing of the iterations
    assert estimates[-1] == pytest.approx(true, rel=2e-3)


def test_lanczos_is_nearer_than_power_at_equal_products():
    A = randn(6, 120, 120)
    true = torch.linalg.svdvals(A)[:, 0]
    power, lanczos = (true - spectral_norm(A, method=m, iterations=10) for m in ("power", "lanczos"))
    assert lanczos.sum() < 0.6 * power.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 6), (6, 1)])
def test_gradient_against_finite_differences(method, shape):
    A, h = randn(*shape, seed=3), 1e-6
    gradient = spectral_norm_grad(A, method=method, iterations=2000)
    for i in range(shape[0]):
        for j in range(shape[1]):
            E = torch.zeros(shape, dtype=torch.float64)
            E[i, j] = h
            slope = (torch.linalg.matrix_norm(A + E, 2) - torch.linalg.matrix_norm(A - E, 2)) / (2 * h)
            assert gradient[i, j].item() == pytest.approx(slope.item(), abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_equal_top_singular_values_give_a_subgradient(method):
    A = with_spectrum(6, 5, [2.0, 2.0, 0.5])
    D = spectral_norm_grad(A, method=method, iterations=200)
    assert torch.linalg.matrix_norm(D, "nuc").item() == pytest.approx(1.0, abs=1e-10)  # and <D, A> = ||A||_2
    assert (D * A).sum().item() == pytest.approx(2.0, abs=1e-10)
    for seed in range(20):
        B = A + 0.3 * randn(6, 5, seed=50 + seed)
        assert torch.linalg.matrix_norm(B, 2) >= 2.0 + (D * (B - A)).sum() - 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_non_finite_matrices_do_not_touch_their_neighbours(method):
    A = randn(4, 5, 3)
    A[1] = 0.0
    A[2, 0, 0] = torch.inf
    top = top_singular(A, method=method, iterations=500)
    assert top.sigma[1] == 0
    assert not top.u[1].any()
    assert not top.v[1].any()
    assert top.residual[1] == 0
    assert top.sigma[2].isnan()
    assert top.u[2].isnan().all()
    torch.testing.assert_close(top.sigma[[0, 3]], torch.linalg.svdvals(A[[0, 3]])[:, 0])
    assert not spectral_norm_grad(torch.zeros(3, 4), method=method).any()


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_a_matrix_gets_the_same_answer_in_any_batch(method):
    A = randn(2, 3, 9, 6)
    together = spectral_norm(A, method=method, iterations=4)
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1, 2], spectral_norm(A[1, 2], method=method, iterations=4))
    torch.testing.assert_close(together, spectral_norm(A.mT, method=method, iterations=4))


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_the_top_vector_may_be_orthogonal_to_the_vector_of_ones(method):
    """The post starts from ones: the estimate is then 0.5, for ever."""
    W = torch.zeros(4, 4)
    W[0, 0], W[0, 1], W[1, 3] = 1.0, -1.0, 0.5
    for seed in range(10):
        assert spectral_norm(W, method=method, seed=seed).item() == pytest.approx(2**0.5, rel=1e-5)


@pytest.mark.parametrize(("method", "iterations"), [("power", 30), ("lanczos", 16)])
def test_defaults_are_those_of_the_documentation_and_the_seed_counts(method, iterations):
    A = randn(300, 200)
    first = top_singular(A, method=method)
    for ours, theirs in zip(first, top_singular(A, method=method, iterations=iterations), strict=True):
        assert torch.equal(ours, theirs)
    assert first.sigma == pytest.approx(torch.linalg.svdvals(A)[0].item(), rel=0.01)
    for find in (spectral_norm, spectral_norm_grad):
        one, two = (find(A, method=method, iterations=2, seed=seed) for seed in (0, 1))
        assert not torch.allclose(one, two)
    assert torch.equal(spectral_norm(A), spectral_norm(A, method="power"))
    assert torch.equal(top_singular(A).v, top_singular(A, method="power").v)
    assert torch.equal(spectral_norm_grad(A), spectral_norm_grad(A, method="svd"))


@pytest.mark.parametrize("seed", range(3))
def test_the_second_start_finds_what_is_orthogonal_to_the_first(seed):
    """With one start power iterations are left at the second singular value."""
    first, second = gaussian_start(9, 2, seed, randn(9, 9)).T
    A = torch.linalg.qr(randn(12, 2)).Q @ torch.stack([first, 2.0 * second])
    assert spectral_norm(A, method="power", seed=seed).item() == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_residual_tells_convergence(method):
    A = randn(30, 20)
    top = top_singular(A, method=method, iterations=3)
    misses = (A @ top.v - top.sigma * top.u).norm(), (A.T @ top.u - top.sigma * top.v).norm()
    assert top.residual.item() == pytest.approx(max(misses).item() / top.sigma.item(), rel=1e-6, abs=1e-12)
    loose, tight = (top_singular(A, method=method, iterations=i).residual.item() for i in (2, 2000))
    assert tight < 1e-7
    if method != "svd":
        assert loose > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_at_any_scale(method, dtype):
    for scale in (1e-3, 1.0, 1e4) if dtype == torch.float16 else (1e-37, 1e-20, 1.0, 1e30):
        A = (with_spectrum(8, 6, [1.0, 0.5, 0.1]) * scale).to(dtype)
        got = spectral_norm(A, method=method)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(torch.linalg.svdvals(A.double())[0].item(), rel=1e-5)


def test_lanczos_survives_an_invariant_krylov_space():
    for A in (torch.eye(6), torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0])), torch.ones(5, 5)):
        got = spectral_norm(A, method="lanczos", iterations=16)
        assert got.item() == pytest.approx(torch.linalg.svdvals(A)[0].item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (0, 3, 3)])
def test_empty_axes(shape):
    top = top_singular(torch.zeros(shape))
    assert top.sigma.shape == shape[:-2]
    assert not top.sigma.any()
    assert top.u.shape == shape[:-1]
    assert top.v.shape == (*shape[:-2], shape[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_norm(torch.zeros(3)), "expected real floating matrices"),
        (lambda: spectral_norm(torch.zeros(3, 3, dtype=torch.complex64)), "complex"),
        (lambda: spectral_norm([[1.0]]), r"found list; convert it with torch\.as_tensor"),
        (lambda: spectral_norm(torch.zeros(3, 3), method="lanczoz"), "did you mean 'lanczos'"),
        (lambda: spectral_norm(torch.zeros(3, 3), iterations=0), "iterations = 0"),
        (lambda: conv_spectral_norm(torch.zeros(3, 3), size=(4,)), "a convolution has a weight"),
        (lambda: conv_spectral_norm(torch.zeros(3, 3, 3)), "size = None"),
        (lambda: conv_spectral_norm(torch.zeros(3, 3, 3), size=(2,)), "at least"),
        (lambda: conv_spectral_norm(torch.zeros(3, 3, 3), size=(4,), kind="reshaped"), "does not depend"),
        (lambda: conv_spectral_norm(torch.zeros(3, 3, 3), kind="reshape"), "did you mean 'reshaped'"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(("kernel", "size"), [((3,), (7,)), ((3, 2), (5, 4)), ((2, 2), (2, 2)), ((2, 1, 3), (3, 2, 4))])
def test_operator_norm_is_that_of_the_explicit_convolution_matrix(kernel, size):
    weight = randn(3, 2, *kernel)
    rank = len(kernel)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    inputs = 2 * torch.Size(size).numel()
    images = torch.eye(inputs, dtype=torch.float64).reshape(inputs, 2, *size)
    padding = [amount for k in reversed(kernel) for amount in (k - 1, 0)]
    matrix = convolve(F.pad(images, padding, mode="circular"), weight).flatten(1)
    true = torch.linalg.matrix_norm(matrix, 2).item()
    assert conv_spectral_norm(weight, size=size).item() == pytest.approx(true, rel=1e-10)
    assert conv_spectral_norm(weight * 1e200, size=size).item() == pytest.approx(true * 1e200, rel=1e-10)

    proxy = conv_spectral_norm(weight, kind="reshaped").item()
    assert proxy == pytest.approx(torch.linalg.matrix_norm(weight.flatten(1), 2).item(), rel=1e-10)
    assert true <= proxy * torch.Size(kernel).numel() ** 0.5 * (1 + 1e-12)


def test_convolutions_that_are_zero_empty_or_not_finite():
    assert conv_spectral_norm(torch.zeros(2, 2, 3, 3), size=(4, 4)) == 0
    assert conv_spectral_norm(torch.zeros(2, 0, 3), size=(4,)) == 0
    assert conv_spectral_norm(torch.full((2, 2, 3), torch.inf), size=(4,)).isnan()


@pytest.mark.parametrize("seed", [2**80, 1.5])
def test_seeds_that_are_no_integers(seed):
    with pytest.raises(ConfigError, match=r"seed = .*; expected an integer of at most 64 bits"):
        spectral_norm(torch.eye(3), seed=seed)
