"""Least squares with columns that depend on each other, against QR in the same precision, NumPy and differences."""

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import hilbert, randn, relative

from quintic.lowrank import cur, interpolative, svd
from quintic.lowrank.least_squares import apply_inverse, column_sizes, pseudo_solve


def by_qr(A, at):
    """A from its columns, by the plain triangle."""
    Q, T = torch.linalg.qr(A[:, at])
    return A[:, at] @ torch.linalg.solve_triangular(T, Q.mH @ A, upper=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_the_numerical_rank_nothing_is_lost(dtype):
    A = hilbert(120, dtype)
    for rank in (12, 24, 40, 80, 119):
        found = interpolative(A, rank=rank)
        assert found.error() < 1.5 * relative(A, by_qr(A, found.cols)), rank
        assert found.error() < 5 * torch.finfo(dtype).eps or rank < 24
        assert found.Z.abs().max() < 10


def test_a_tolerance_near_the_rounding_error_takes_about_the_least_rank():
    A = hilbert(120, torch.float32)
    for tol in (5e-6, 2e-6, 1e-6):
        assert interpolative(A, tol=tol).rank <= svd(A, tol=tol).rank + 1
    B = hilbert(120)
    assert interpolative(B, tol=3e-15).rank <= cur(B, tol=3e-15).rank + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_dependent_columns_have_small_coefficients_and_derivatives_at_their_rank(dtype):
    L, R, B = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(7, 2), (2, 4), (7, 5)]))
    expected = np.linalg.pinv((L @ R).numpy(), rcond=1e-10) @ B.numpy()
    torch.testing.assert_close(pseudo_solve(L @ R, B), torch.from_numpy(expected))
    inputs = [each.requires_grad_() for each in (L, R, B)]
    assert torch.autograd.gradcheck(lambda L, R, B: pseudo_solve(L @ R, B), inputs)
    S, C = randn(3, 3, seed=5, dtype=dtype).requires_grad_(), randn(2, 5, 3, seed=6, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(pseudo_solve, (S, randn(3, 4, dtype=dtype).requires_grad_()))
    assert torch.autograd.gradcheck(pseudo_solve, (C, randn(2, 5, 2, dtype=dtype).requires_grad_()))


def test_independent_columns_of_any_lengths_are_solved_by_the_triangle():
    A = randn(12, 9)
    at, scale = [3, 5, 7], torch.ones(9, dtype=A.dtype)
    scale[3], scale[5] = 2.0**40, 2.0**-40
    plain, scaled = interpolative(A, indices=at), interpolative(A * scale, indices=at)
    assert torch.equal(scaled.Z, plain.Z / scale[at, None] * scale)
    sizes = column_sizes(torch.cat([A, torch.zeros(12, 1)], 1) * 1e-200)
    assert sizes[0, -1] == 1 and (sizes.log2() == sizes.log2().round()).all()
    ratio = A.norm(dim=0) / (sizes[0, :-1] / 1e-200)
    assert (ratio > 0.9).all() and (ratio < 2.1).all()


def test_gradients_of_independent_columns_whatever_their_lengths():
    A = torch.eye(6, 5, dtype=torch.float64)
    A[0, 0] = 1e9
    A.requires_grad_()
    interpolative(A, indices=[0, 1, 2]).Z.sum().backward()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    expected[:3, 3:] = torch.tensor([1e-9, 1.0, 1.0])[:, None]  # of T^-1 Q'
    expected[3:5, :3] = torch.tensor([1e-18, 1.0, 1.0])  # of the residual, seen by the columns
    torch.testing.assert_close(A.grad, expected)


def test_a_matrix_of_a_batch_keeps_its_gradient_beside_one_without():
    alone = torch.eye(6, 5, dtype=torch.float64).requires_grad_()
    interpolative(alone, indices=[0, 1, 2]).reconstruct().sum().backward()
    both = torch.stack([torch.eye(6, 5), torch.ones(6, 5)]).double().requires_grad_()
    interpolative(both, indices=[0, 1, 2]).reconstruct()[0].sum().backward()
    torch.testing.assert_close(both.grad[0], alone.grad)
    assert torch.equal(both.grad[1], torch.zeros(6, 5, dtype=torch.float64))


def test_a_triangle_of_a_batch_keeps_its_gradient_beside_one_without():
    T = torch.stack([torch.eye(3), torch.ones(3, 3).triu() * torch.tensor([1.0, 0.0, 0.0])]).double().requires_grad_()
    apply_inverse(T, torch.ones(2, 3, 2, dtype=torch.float64), adjoint=True)[0].sum().backward()
    assert torch.equal(T.grad[1], torch.zeros(3, 3, dtype=torch.float64)) and T.grad[0].isfinite().all()
