"""Residuals of sparse matrices, made without dense blocks where that is exact enough, against dense ones."""

import numpy as np
import pytest
import scipy.sparse
import torch
from tests.lowrank.matrices import relative

from quintic.lowrank import cur, interpolative
from quintic.lowrank.source import Sparse, as_source

NOISES = (3.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12, 0.0)


def thin_and_noise(noise, dtype: type[np.number] = np.float64):
    """L (300, 4), R (4, 200) with many zeros, and L R with relative noise where it is not zero."""
    rng = np.random.default_rng(0)
    L = rng.random((300, 4)) * (rng.random((300, 4)) < 0.2)
    R = rng.normal(size=(4, 200)) * (rng.random((4, 200)) < 0.2)
    if np.issubdtype(dtype, np.complexfloating):
        L = L * np.exp(1j * rng.random(L.shape))
    A = L @ R
    E = rng.normal(size=A.shape) * (A != 0)
    return L.astype(dtype), R.astype(dtype), (A + noise * E * np.linalg.norm(A) / np.linalg.norm(E)).astype(dtype)


def no_rows(self, at):
    raise AssertionError("rows were made dense")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_it_is_the_dense_one_at_any_scale_and_size(noise, scale, dtype):
    L, R, A = thin_and_noise(noise, dtype)
    wide = np.clongdouble if dtype == np.complex128 else np.longdouble
    S = scipy.sparse.csr_matrix(A * scale)
    back = S.toarray().astype(wide) / wide(scale)
    E = back - L.astype(wide) @ R.astype(wide)
    truth = float(np.sqrt((np.abs(E) ** 2).sum() / (np.abs(back) ** 2).sum()))
    for left, right in ((L * scale, R), (L, R * scale)):
        off, whole = as_source(S).residual(torch.from_numpy(left), torch.from_numpy(right))
        assert float(off / whole) == pytest.approx(truth, rel=1e-6, abs=1e-15)
        off, whole = as_source(S).H.residual(torch.from_numpy(right).mH, torch.from_numpy(left).mH)
        assert float(off / whole) == pytest.approx(truth, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_single_precision_is_summed_in_double(scale, monkeypatch):
    monkeypatch.setattr(Sparse, "rows", no_rows)
    L, R, A = thin_and_noise(1e-3, np.float32)
    S = scipy.sparse.csr_matrix(A * np.float32(scale))
    off, whole = as_source(S).residual(torch.from_numpy(L * np.float32(scale)), torch.from_numpy(R))
    truth = relative(A.astype(float), L.astype(float) @ R.astype(float))
    # The scale itself is rounded to single precision.
    assert float(off / whole) == pytest.approx(truth, rel=1e-6 if scale == 1 else 1e-4)


def test_an_error_makes_no_row_of_a_large_sparse_matrix_dense(monkeypatch):
    rng = np.random.default_rng(0)
    place = (rng.integers(40_000, size=3000), rng.integers(30_000, size=3000))
    S = scipy.sparse.csr_matrix((rng.normal(size=3000), place), (40_000, 30_000))
    found = cur(S, rank=5, method="fast")
    by_rows = interpolative(S, rank=5, side="rows", method="fast")
    monkeypatch.setattr(Sparse, "rows", no_rows)
    # ||A - C Z||^2 = ||A||^2 - ||C Z||^2 for a projection.
    whole = (S.data**2).sum()
    for given in (found, by_rows):
        kept = np.trace((given.left.T @ given.left) @ (given.right @ given.right.T))
        assert given.error() == pytest.approx(np.sqrt(1 - kept / whole), rel=1e-9)


def test_factors_far_larger_than_the_matrix_and_of_less_than_their_rank():
    _, _, A = thin_and_noise(0.1)
    L, R = np.ones((300, 6)), 1e9 * np.arange(1200.0).reshape(6, 200)
    off, whole = as_source(scipy.sparse.csr_matrix(A)).residual(torch.from_numpy(L), torch.from_numpy(R))
    assert float(off) == pytest.approx(np.linalg.norm(A - L @ R), rel=1e-12)
    assert float(whole) == pytest.approx(np.linalg.norm(A), rel=1e-12)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5, 1e-8])
def test_a_tolerance_of_a_sparse_matrix_is_that_of_the_dense_one(tol):
    rng = np.random.default_rng(1)
    A = sum(
        10.0**-i * np.outer(rng.random(90) * (rng.random(90) < 0.3), rng.random(70) * (rng.random(70) < 0.3))
        for i in range(12)
    )
    found = interpolative(scipy.sparse.csr_matrix(A), tol=tol)
    assert relative(A, found.reconstruct()) <= tol * (1 + 1e-6)
    assert found.rank <= interpolative(A, tol=tol).rank + 1


def test_zeros_and_exact_ranks():
    zero = scipy.sparse.csr_matrix((30, 20))
    assert cur(zero, rank=2).error() == 0.0
    off, whole = as_source(zero).residual(torch.ones(30, 1).double(), torch.ones(1, 20).double())
    assert float(off) == pytest.approx(600**0.5) and float(whole) == 0.0
    _, _, A = thin_and_noise(0.0)
    assert cur(scipy.sparse.csr_matrix(A), rank=4).error() < 1e-14
