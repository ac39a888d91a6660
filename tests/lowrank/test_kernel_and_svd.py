"""Nystrom approximations of kernels, and the randomised SVD, against definitions and the exact SVD."""

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import best, hilbert, randn, relative, with_spectrum

from quintic.core import ConfigError, DataError
from quintic.lowrank import RULES, cur, interpolative, nystrom, svd


def kernel(n=60, d=3, width=4.0, seed=0):
    x = randn(n, d, seed=seed)
    return torch.exp(-torch.cdist(x, x).square() / width)


@pytest.mark.parametrize("method", RULES)
def test_nystrom_is_its_formula_and_never_exceeds_the_kernel(method):
    A = kernel() + 1e-3 * torch.eye(60)
    found = nystrom(A, rank=8, method=method)
    C, W = A[:, found.cols], A[found.cols][:, found.cols]
    assert relative(C @ torch.linalg.solve(W, C.T), found.reconstruct()) < 1e-10
    torch.testing.assert_close(found.F @ found.F.mH, found.reconstruct())
    assert torch.linalg.eigvalsh(A - found.reconstruct()).min() > -1e-12
    assert torch.equal(found.rows, found.cols)


def test_complex_batched_numpy_fixed_and_labelled():
    G = randn(2, 7, 7, dtype=torch.complex128)
    A = G @ G.mH
    found = nystrom(A, rank=3)
    alone = nystrom(A[1].numpy(), rank=3, labels=list("abcdefg"))
    torch.testing.assert_close(found.reconstruct()[1], torch.from_numpy(alone.reconstruct()))
    assert alone.names == ["abcdefg"[i] for i in alone.cols]
    fixed = nystrom(A[0], indices=[5, 2])
    torch.testing.assert_close(fixed.reconstruct()[:, [5, 2]], A[0][:, [5, 2]])


def test_nystrom_is_differentiable():
    G = randn(6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda G: nystrom(G @ G.T, indices=[4, 1]).reconstruct(), G)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_nystrom_is_differentiable_at_equal_eigenvalues_and_at_dependent_columns(dtype):
    root = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0])).to(dtype)

    def made(G):
        return nystrom(G @ G.mH, indices=[0, 1]).reconstruct()

    assert torch.autograd.gradcheck(made, root.requires_grad_())
    thin = randn(6, 2, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda G: nystrom(G @ G.mH, indices=[4, 1, 0, 2]).reconstruct(), thin)
    x = (100 * randn(300, 1)).requires_grad_()  # so far apart that the kernel is the identity
    nystrom(torch.exp(-5 * torch.cdist(x, x).square()), rank=20).reconstruct().sum().backward()
    assert x.grad.isfinite().all()


def test_factors_of_nystrom_are_differentiable_twice_where_eigenvalues_differ():
    G = randn(4, 4).requires_grad_()

    def made(G):  # eigenvectors are known up to their sign
        return nystrom(G @ G.T, indices=[3, 1]).F.abs()

    assert torch.autograd.gradcheck(made, G) and torch.autograd.gradgradcheck(made, G)


def test_nystrom_leaves_out_eigenvalues_that_are_rounding_errors():
    found = nystrom(torch.diag(torch.tensor([1.0, 1e-17, 0.5, 1e-15, 0.0], dtype=torch.float64)), indices=[0, 1, 2, 3])
    assert sorted(found.normalization.abs().amax(0).tolist()) == pytest.approx([0.0, 1.0, 2**0.5, 1e15**0.5])


def test_more_columns_than_the_numerical_rank_do_not_make_nystrom_worse():
    x = torch.linspace(0, 1, 200)
    A = torch.exp(-20 * (x[:, None] - x).square())
    for rank in (15, 30, 60, 200):
        assert nystrom(A, rank=rank).error() < 2e-6
    assert nystrom(A, tol=1e-6).rank <= 18


def test_nystrom_of_an_ill_conditioned_kernel_keeps_its_accuracy():
    assert nystrom(hilbert(200), rank=20).error() < 1e-12
    assert nystrom(hilbert(200, torch.float32), rank=20).error() < 3e-5
    F = randn(30, 3)
    assert nystrom(F @ F.T, indices=[4, 1, 7, 20, 9, 11]).error() < 1e-12  # more landmarks than the rank


def test_quality_landmarks_beat_uniform_ones():
    A = kernel(200, 4, 8.0)
    assert nystrom(A, rank=20).error() < 0.7 * np.median(
        [nystrom(A, rank=20, method="uniform", seed=s).error() for s in range(9)]
    )


def test_what_is_no_kernel():
    with pytest.raises(DataError, match="square"):
        nystrom(randn(4, 5), rank=1)
    with pytest.raises(DataError, match="Hermitian"):
        nystrom(randn(5, 5), rank=3)
    with pytest.raises(DataError, match="semi-definite"):
        nystrom(torch.diag(torch.tensor([1.0, -1.0, 2.0])), rank=3)
    with pytest.raises(ConfigError, match="exactly one"):
        nystrom(kernel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_svd_is_exact_for_small_matrices_and_near_the_best_for_large_ones(dtype):
    A = randn(2, 12, 9, dtype=dtype)
    found = svd(A, rank=9)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(A))
    torch.testing.assert_close(found.reconstruct(), A)
    large = with_spectrum(300, 250, 1 / np.arange(1, 251), dtype=dtype)
    found = svd(large, rank=12)
    assert torch.linalg.vector_norm(large - found.reconstruct()) < 1.03 * best(large, 12)
    torch.testing.assert_close(found.U.mH @ found.U, torch.eye(12, dtype=dtype), atol=1e-5, rtol=0)
    assert svd(large, rank=12, power=0).error() > found.error()
    assert not torch.equal(svd(large, rank=12, power=0).S, svd(large, rank=12, power=0, seed=1).S)


def test_the_rule_is_quality_unless_another_is_asked_for():
    A = kernel(30, 4, 8.0)
    for decompose in (interpolative, cur, nystrom):
        usual, quality = decompose(A, 5), decompose(A, 5, method="quality")
        assert usual.method == "quality" and torch.equal(usual.left, quality.left)


def test_svd_of_a_batch_of_any_scales():
    A, scale = randn(3, 6, 5), torch.tensor([1e200, 1.0, 1e-200], dtype=torch.float64)[:, None, None]
    found = svd(A * scale, rank=5)
    torch.testing.assert_close(found.S / scale[..., 0], torch.linalg.svdvals(A))
    torch.testing.assert_close(found.reconstruct() / scale, A)


def test_svd_mistakes():
    with pytest.raises(ConfigError, match="exactly one"):
        svd(randn(3, 3))
    for power in (-1, 1.5, "2", None, True):
        with pytest.raises(ConfigError, match=f"power = {power!r}; expected a whole number, 0 or more"):
            svd(randn(3, 3), rank=1, power=power)
