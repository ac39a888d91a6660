"""Kernels of points that are never whole in memory, against the matrix itself and scikit-learn's Nystroem."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from tests.lowrank.matrices import randn, relative

from quintic.core import ConfigError, DataError
from quintic.lowrank import KernelMatrix, cur, kernel_matrix, nystrom, select_columns, svd


def gauss(X, Y):
    return torch.exp(-torch.cdist(X, Y).square() / 4)


def gauss_of_arrays(X, Y):
    return gauss(torch.from_numpy(X), torch.from_numpy(Y)).numpy()


def characters(X, Y):
    """Hermitian and complex: sum_w exp(i w (x - y))."""
    w = torch.arange(1.0, 9.0, dtype=torch.float64)
    return torch.exp(1j * X[:, None] * w) @ torch.exp(-1j * w[:, None] * Y)


@pytest.fixture(params=[50, 2**22])
def part(request, monkeypatch):
    monkeypatch.setattr(kernel_matrix, "PART", request.param)
    return request.param


@pytest.mark.parametrize(("kernel", "shape"), [(gauss, (30, 3)), (characters, (30,))])
def test_it_is_the_matrix(kernel, shape, part):
    x = randn(*shape)
    source, A = KernelMatrix(kernel, x), kernel(x, x)
    assert source.shape == (30, 30) and source.dtype == A.dtype
    X, at = randn(30, 3, dtype=A.dtype), torch.tensor([7, 0, 21])
    torch.testing.assert_close(source.matmat(X), A @ X)
    torch.testing.assert_close(source.rmatmat(X), A.mH @ X)
    torch.testing.assert_close(source.H.matmat(X), A.mH @ X)
    assert source.passes == 3
    torch.testing.assert_close(source.columns(at), A[:, at])
    torch.testing.assert_close(source.rows(at).resolve_conj(), A[at])
    assert source.passes == 3
    off, whole = source.residual(X, X.mH)
    assert float(off) == pytest.approx(float((A - X @ X.mH).norm()), rel=1e-12)
    assert float(whole) == pytest.approx(float(A.norm()), rel=1e-12)


@pytest.mark.parametrize(("kernel", "shape"), [(gauss, (30, 3)), (characters, (30,))])
def test_features_are_those_of_the_dense_way(kernel, shape, part):
    x, new = randn(*shape), randn(11, *shape[1:], seed=1)
    found, dense = nystrom(KernelMatrix(kernel, x), indices=[4, 17, 8]), nystrom(kernel(x, x), indices=[4, 17, 8])
    torch.testing.assert_close(found.F, dense.F)
    torch.testing.assert_close(found.features(x), found.F)
    made = found.features(new)
    W, C = kernel(x[[4, 17, 8]], x[[4, 17, 8]]), kernel(new, x[[4, 17, 8]])
    torch.testing.assert_close(made @ made.mH, C @ torch.linalg.solve(W, C.mH))
    torch.testing.assert_close(made @ found.F.mH, C @ torch.linalg.solve(W, kernel(x[[4, 17, 8]], x)))
    torch.testing.assert_close(kernel(new, x[found.indices]) @ dense.normalization, made)
    assert found.features(new[:0]).shape == (0, 3)
    assert found.error() == pytest.approx(dense.error(), rel=1e-9)


def test_features_are_those_of_scikit_learn_for_the_same_columns():
    kernel_approximation = pytest.importorskip("sklearn.kernel_approximation")
    rbf_kernel = pytest.importorskip("sklearn.metrics.pairwise").rbf_kernel
    x, new = randn(80, 5).numpy(), randn(9, 5, seed=1).numpy()
    theirs = kernel_approximation.Nystroem(gamma=0.1, n_components=12, random_state=0).fit(x)

    def kernel(X, Y):
        return rbf_kernel(X, Y, gamma=0.1)

    ours = nystrom(KernelMatrix(kernel, x), indices=theirs.component_indices_)
    for points in (x, new):
        made, expected = ours.features(points), theirs.transform(points)
        assert isinstance(made, np.ndarray)
        np.testing.assert_allclose(made @ made.T, expected @ expected.T, atol=1e-12)
    chosen = nystrom(KernelMatrix(kernel, x), rank=12)
    assert chosen.error() < 0.8 * ours.error()
    sparse = nystrom(KernelMatrix(kernel, scipy.sparse.coo_array(x)), indices=theirs.component_indices_)
    np.testing.assert_allclose(sparse.F, ours.F)
    np.testing.assert_allclose(sparse.features(scipy.sparse.csc_array(new)), ours.features(new))


@pytest.mark.parametrize(("method", "passes"), [("quality", 7), ("fast", 3), ("uniform", 0), ("pivoted-qr", 1)])
def test_never_more_than_a_block_or_the_chosen_columns_is_evaluated(method, passes, monkeypatch):
    monkeypatch.setattr(kernel_matrix, "PART", 3000)
    asked = []

    def counted(X, Y):
        asked.append(len(X) * len(Y))
        return gauss(X, Y)

    source = KernelMatrix(counted, randn(500, 3))
    found = nystrom(source, rank=6, method=method)
    assert max(asked) <= 3000 and source.passes == passes
    assert sum(asked) == passes * 500**2 + 500 * 6 + 2  # and two, for its dtype
    assert source.passes == passes and found.features(randn(2, 3)).shape == (2, 6)
    dense = nystrom(gauss(source.points, source.points), indices=found.indices)
    torch.testing.assert_close(found.F, dense.F)
    assert found.error() == pytest.approx(dense.error(), rel=1e-9)


def test_other_decompositions_take_it():
    x = randn(60, 2).numpy()
    source, A = KernelMatrix(gauss_of_arrays, x), gauss_of_arrays(x, x)
    np.testing.assert_allclose(svd(source, rank=5).S, np.linalg.svd(A)[1][:5], rtol=1e-6)
    found = cur(source, rank=8)
    np.testing.assert_allclose(found.C, A[:, found.cols])
    np.testing.assert_allclose(found.R, A[found.rows])
    assert found.error() == pytest.approx(relative(A, found.reconstruct()), rel=1e-9)
    by_tolerance = nystrom(source, tol=1e-3)
    assert relative(A, by_tolerance.reconstruct()) <= 1e-3
    assert select_columns(source, 4).shape == (4,)


def test_gradients_reach_points_and_kernel():
    x, new = randn(7, 2).requires_grad_(), randn(3, 2, seed=1).requires_grad_()
    width = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def made(x, new, width):
        found = nystrom(
            KernelMatrix(lambda X, Y: torch.exp(-(X[:, None] - Y).square().sum(-1) / width), x), indices=[5, 1]
        )
        features = found.features(new)
        return features @ features.mH, found.reconstruct()

    assert torch.autograd.gradcheck(made, (x, new, width))
    nystrom(KernelMatrix(gauss, x), rank=2).F.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_the_normalization_is_of_the_matrix_as_given(scale):
    A = gauss(randn(20, 3), randn(20, 3)) * scale
    found = nystrom(A, indices=[3, 11])
    torch.testing.assert_close(A[:, [3, 11]] @ found.normalization, found.F, rtol=1e-10, atol=0)


def test_mistakes():
    x = randn(9, 2)
    with pytest.raises(DataError, match=r"found a function.*KernelMatrix\(kernel, X\)"):
        nystrom(gauss, rank=3)
    no_function: Any = gauss(x, x)
    with pytest.raises(ConfigError, match="expected a function kernel"):
        KernelMatrix(no_function, x)
    with pytest.raises(DataError, match="at least one point"):
        KernelMatrix(gauss, x[:0])
    with pytest.raises(DataError, match="expected points"):
        KernelMatrix(gauss, 3.0)
    with pytest.raises(DataError, match=r"kernel of 1 and 2 points has shape \(2,\); expected \(1, 2\)"):
        KernelMatrix(lambda X, Y: (X * Y).sum(-1), x)
    with pytest.raises(DataError, match="not finite"):
        KernelMatrix(lambda X, Y: gauss(X, Y) / 0, x)
    with pytest.raises(DataError, match="Hermitian"):
        nystrom(KernelMatrix(lambda X, Y: X @ Y.mT + X[:, :1], x), rank=3)
    found = nystrom(KernelMatrix(gauss, x), rank=3)
    for new in (randn(3, 4), randn(2), randn(3, 2).numpy()):
        with pytest.raises(DataError, match=r"new points are .*expected a Tensor of shape \('l', 2\)"):
            found.features(new)
    with pytest.raises(ConfigError, match="features of new points need the kernel"):
        nystrom(gauss(x, x), rank=3).features(x)
