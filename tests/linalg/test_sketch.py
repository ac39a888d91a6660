"""Sketches keep lengths, find ranges and measure norms; what they draw depends on shape, seed and dtype alone."""

import math
import re

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import randn

from quintic.core import ConfigError
from quintic.linalg.sketch import (
    Operator,
    adjoint_times,
    dominant,
    gaussian,
    probe_norm,
    safe_range,
    safe_scale,
    sketch_rows,
    times,
)


def falling(m, n, ratio, seed=0):
    k = min(m, n)
    U = torch.linalg.qr(randn(m, k, seed=seed)).Q
    V = torch.linalg.qr(randn(n, k, seed=seed + 1)).Q
    return U * ratio ** torch.arange(k, dtype=torch.float64) @ V.T


class ByProducts:
    """A tensor that only shows its products."""

    def __init__(self, A):
        self.A, self.shape, self.dtype = A, tuple(A.shape), A.dtype

    def matmat(self, X):
        return self.A @ X

    def rmatmat(self, X):
        return self.A.mH @ X


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_gaussian_has_unit_variance_and_depends_on_the_seed(dtype):
    G = gaussian(200, 300, 3, dtype)
    assert G.dtype == dtype
    assert abs(G.abs().square().mean().item() - 1) < 0.03
    assert abs(G.mean().item()) < 0.02
    assert torch.equal(G, gaussian(200, 300, 3, dtype))
    assert not torch.equal(G, gaussian(200, 300, 4, dtype))


@pytest.mark.parametrize("seed", [1.5, "1", None, 2**70])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match=re.escape(f"seed = {seed!r}; expected an integer")):
        gaussian(2, 2, seed, torch.float32)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    gaussian(5, 5, 1, torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_an_operator_gives_the_same_as_its_matrix():
    A = randn(30, 20, dtype=torch.complex128)
    operator = ByProducts(A)
    assert isinstance(operator, Operator)
    X, Y = randn(20, 3, dtype=torch.complex128), randn(30, 3, dtype=torch.complex128)
    torch.testing.assert_close(times(operator, X), A @ X)
    torch.testing.assert_close(adjoint_times(operator, Y), A.mH @ Y)
    torch.testing.assert_close(sketch_rows(operator, 8, seed=1, power=1), sketch_rows(A, 8, seed=1, power=1))


def test_a_sketch_keeps_the_lengths_of_columns():
    A = randn(500, 40) * torch.logspace(-3, 3, 40, dtype=torch.float64)
    Y = sketch_rows(A, 200) / math.sqrt(200)
    ratio = Y.norm(dim=0) / A.norm(dim=0)
    assert ratio.min() > 0.8 and ratio.max() < 1.2


def test_a_power_step_turns_the_sketch_towards_the_dominant_directions():
    A = falling(120, 100, 0.97)
    V = torch.linalg.svd(A).Vh[:5].mH

    def captured(power):
        Q = torch.linalg.qr(sketch_rows(A, 10, power=power).mH).Q
        return (Q.mH @ V).norm() ** 2 / 5

    assert captured(0) < captured(1) < captured(3)
    assert captured(3) > 0.95


def test_a_matrix_gets_the_same_sketch_in_any_batch():
    A = randn(3, 20, 30)
    torch.testing.assert_close(sketch_rows(A, 7, power=1)[1], sketch_rows(A[1], 7, power=1))


def test_dominant_is_the_svd_of_a_small_matrix():
    A = randn(30, 50, dtype=torch.complex128)
    U, S, Vh = dominant(A, 4)
    torch.testing.assert_close(S, torch.linalg.svdvals(A)[:4])
    torch.testing.assert_close(A @ Vh.mH, U * S)


@pytest.mark.parametrize("wrap", [lambda A: A, ByProducts])
def test_dominant_of_a_large_matrix_is_near_the_best(wrap):
    A = falling(400, 300, 0.9)
    U, S, Vh = dominant(wrap(A), 20, power=2)
    error = torch.linalg.vector_norm(A - U * S @ Vh)
    assert error < 1.01 * torch.linalg.vector_norm(torch.linalg.svdvals(A)[20:])
    torch.testing.assert_close(U.mH @ U, torch.eye(20, dtype=torch.float64))
    first, default, other = (
        dominant(wrap(A), 20, **options).S for options in ({"power": 1, "seed": 0}, {}, {"power": 1, "seed": 1})
    )
    assert torch.equal(first, default) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_probes_measure_the_frobenius_norm_and_know_their_spread(dtype):
    A = randn(60, 50, dtype=dtype)
    A = A + 5 * torch.outer(A[:, 0], A[0])  # a dominant direction makes the spread large
    true = torch.linalg.vector_norm(A).square().item()
    means, spreads = zip(*(probe_norm(A @ gaussian(50, 40, s, dtype)) for s in range(400)), strict=True)
    means, spreads = np.array(means), np.array(spreads)
    assert abs(means.mean() / true - 1) < 0.03
    real = dtype == torch.float64
    # The formula is for real probes; complex ones have half of that variance.
    assert 0.85 < spreads.mean() / (means.std() * (1 if real else math.sqrt(2))) < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_the_safe_range_squares_keep_their_rounding_errors(dtype):
    least, most = safe_range(dtype)
    info = torch.finfo(dtype)
    assert least**2 * info.eps > info.tiny and 1e6 * most**2 < info.max


def test_safe_scale_is_a_power_of_two_only_where_squares_could_overflow():
    A = torch.stack([torch.full((2, 3), 3.0), torch.full((2, 3), 3e30), torch.full((2, 3), -1e-30), torch.zeros(2, 3)])
    scale = safe_scale(A)
    assert scale[0] == scale[3] == 1
    assert ((A / scale)[1:3].abs() >= 1).all() and ((A / scale)[1:3].abs() < 2).all()
    assert torch.equal(torch.log2(scale).round(), torch.log2(scale))
    assert safe_scale(torch.tensor([[-3e30, 1.0]])).item() > 1e30
    assert safe_scale(A[0]) == 1.0 and isinstance(safe_scale(A[0]), float)
    assert safe_scale(torch.tensor([1e200j, 0], dtype=torch.complex128)).item() > 1e199
