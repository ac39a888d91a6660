"""Interpolative decompositions against least squares, on every kind of input."""

import numpy as np
import pytest
import scipy.linalg.interpolative as sli
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator, svds
from tests.lowrank.matrices import best, randn, relative, with_spectrum

from quintic.core import ConfigError, DataError
from quintic.lowrank import RULES, cur, interpolative, svd
from quintic.lowrank.least_squares import apply_inverse


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_coefficients_are_least_squares_and_interpolate(method, side):
    A = with_spectrum(30, 40, 0.8 ** np.arange(30), dtype=torch.complex128)
    found = interpolative(A, rank=6, side=side, method=method)
    B = A if side == "columns" else A.mH
    at = found.indices
    expected = torch.from_numpy(np.linalg.lstsq(B[:, at].numpy(), B.resolve_conj().numpy(), rcond=None)[0])
    Z = found.Z if side == "columns" else found.Z.mH
    torch.testing.assert_close(Z, expected, atol=1e-7, rtol=1e-7)
    assert torch.equal(Z[:, at], torch.eye(6, dtype=Z.dtype))
    assert torch.equal(found.left if side == "columns" else found.right.mH, B[:, at])
    assert found.error() == pytest.approx(relative(A, found.reconstruct()), rel=1e-9)


def test_the_two_sides_name_their_parts():
    A = randn(8, 9)
    columns, rows = interpolative(A, 3), interpolative(A, 3, side="rows")
    assert columns.rows is None and columns.R is None and torch.equal(columns.C, A[:, columns.cols])
    assert rows.cols is None and rows.C is None and torch.equal(rows.R, A[rows.rows])
    assert columns.rank == rows.rank == 3 and columns.shape == (8, 9)
    x = randn(9)
    torch.testing.assert_close(columns.matvec(x), columns.reconstruct() @ x)
    torch.testing.assert_close(rows @ A.mT, rows.reconstruct() @ A.mT)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), batch=st.sampled_from([(), (2,), (2, 1)]), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
)  # fmt: skip
def test_full_rank_reproduces_any_matrix(m, n, batch, data, dtype):
    A = randn(*batch, m, n, seed=data.draw(st.integers(0, 99)), dtype=dtype)
    for side in ("columns", "rows"):
        found = interpolative(A, rank=min(m, n), side=side)
        assert found.reconstruct().shape == A.shape and found.left.dtype == dtype
        assert np.all(np.asarray(found.error()) < 300 * torch.finfo(dtype).eps)


def test_a_batch_is_its_matrices():
    A = randn(2, 3, 10, 12)
    found = interpolative(A, rank=4)
    assert found.error().shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = interpolative(A[i, j], rank=4)
            assert torch.equal(found.cols[i, j], alone.cols)
            torch.testing.assert_close(found.Z[i, j], alone.Z)
            assert found.error()[i, j].item() == pytest.approx(alone.error())
    x = randn(2, 3, 12)
    torch.testing.assert_close(found.matvec(x)[1, 2], found.reconstruct()[1, 2] @ x[1, 2])
    assert "relative errors" in repr(found)  # which was asked for


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_result_is_an_operator(dtype, kind):
    A, X = randn(8, 6, dtype=dtype), randn(8, 2, seed=1, dtype=dtype)
    A, X = (A, X) if kind == "tensor" else (A.numpy(), X.numpy())
    found = interpolative(A, rank=3)
    whole = found.reconstruct()
    for made, expected in (
        (found @ A.T, whole @ A.T),
        (A.T @ found, A.T @ whole),
        (found.rmatvec(X[:, 0]), whole.conj().T @ X[:, 0]),
        (found.rmatmat(X), whole.conj().T @ X),
        (found.matvec(A[:1].T), whole @ A[:1].T),
        (np.asarray(found), whole),
        (interpolative(found, rank=3).reconstruct(), whole),
    ):
        np.testing.assert_allclose(made, expected, atol=1e-12)
    assert np.asarray(found, dtype=np.complex64).dtype == np.complex64
    assert type(A.T @ found) is type(A) and found.dtype == A.dtype
    with pytest.raises(DataError, match=r"expected vectors \(\.\.\., 6\), found shape \(8,\)"):
        found.matvec(X[:, 0])
    with pytest.raises(DataError, match=r"expected vectors \(\.\.\., 8\)"):
        found.rmatvec(A[0])


def test_a_result_is_an_operator_of_scipy_again():
    A = randn(9, 7).numpy()
    found = cur(A, rank=3)
    operator = aslinearoperator(found)
    np.testing.assert_allclose(svds(operator, k=2, random_state=0)[1], np.linalg.svd(found.reconstruct())[1][1::-1])
    np.testing.assert_allclose(operator.H @ A[:, 0], found.reconstruct().T @ A[:, 0])


def test_results_of_a_batch_are_no_operator_but_have_products():
    A = randn(2, 6, 5)
    found = interpolative(A, rank=2)
    torch.testing.assert_close(A.mT @ found, A.mT @ found.reconstruct())
    torch.testing.assert_close(found.rmatvec(A[..., 0])[1], found.reconstruct()[1].T @ A[1, :, 0])
    with pytest.raises(DataError, match="operators are taken one at a time"):
        svd(found, rank=1)


def test_numpy_in_numpy_out():
    A = np.random.default_rng(0).normal(size=(9, 7))
    found = interpolative(A, rank=3)
    assert all(isinstance(part, np.ndarray) for part in (found.cols, found.C, found.Z, found.reconstruct()))
    assert found.cols.dtype == np.int64
    np.testing.assert_array_equal(found.C, A[:, found.cols])
    assert isinstance(found.error(), float)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, bool])
def test_integers_are_computed_in_double_precision(dtype):
    A = np.random.default_rng(0).integers(0, 5, size=(6, 8)).astype(dtype)
    found = interpolative(A, rank=5)
    assert found.Z.dtype == np.float64
    np.testing.assert_array_equal(found.C, A[:, found.cols].astype(float))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    found = interpolative(randn(8, 6).to(dtype), rank=3)
    assert found.Z.dtype == torch.float32 and found.Z.isfinite().all()


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_for_fixed_indices(side, dtype):
    A = randn(6, 5, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: interpolative(A, indices=[3, 0], side=side).Z, A)
    assert torch.autograd.gradcheck(lambda A: interpolative(A, indices=[3, 0], side=side).reconstruct(), A)


def test_gradients_reach_a_tensor_through_chosen_columns():
    A = randn(6, 5, seed=1).requires_grad_()
    interpolative(A, rank=2).reconstruct().square().sum().backward()
    assert A.grad.isfinite().all() and A.grad.abs().sum() > 0


def test_fixed_indices_may_count_from_the_end_and_serve_a_batch():
    A = randn(3, 6, 5)
    found = interpolative(A, indices=[-1, 0])
    assert torch.equal(found.cols, torch.tensor([4, 0]).expand(3, 2)) and found.method == "fixed"


def test_labels_and_repr():
    A = randn(4, 3)
    found = interpolative(A, indices=[2, 0], column_labels=["a", "b", "c"])
    assert found.names == ["c", "a"]
    assert interpolative(A, indices=[1], side="rows", row_labels="wxyz").names == ["x"]
    assert repr(found) == "Interpolation(4 x 3, rank 2, method 'fixed')"
    error = found.error()
    assert repr(found) == f"Interpolation(4 x 3, rank 2, relative error {error:.3g}, method 'fixed')"
    with pytest.raises(DataError, match="2 column labels for 3"):
        interpolative(A, rank=1, column_labels=["a", "b"])
    with pytest.raises(ConfigError, match="column labels are for a single matrix"):
        interpolative(randn(2, 4, 3), rank=1, column_labels=["a", "b", "c"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "tol": 0.1}, "exactly one"),
        ({"rank": 0}, "expected 1 to 3"),
        ({"rank": 4}, "expected 1 to 3"),
        ({"rank": 1.5}, "expected 1 to 3"),
        ({"rank": True}, "expected 1 to 3"),
        ({"rank": 1, "side": "cols"}, "unknown side 'cols'"),
        ({"indices": [3]}, "expected 0 to 2"),
        ({"indices": [0.5]}, "list of positions"),
        ({"indices": []}, "list of positions"),
        ({"tol": 0.0}, "between 0 and 1"),
        ({"tol": 1.0}, "between 0 and 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        interpolative(randn(4, 3), **options)


def test_fast_is_as_good_as_scipy_and_really_random():
    A = with_spectrum(400, 400, 1 / np.arange(1, 301))
    k = 40
    J, P = sli.interp_decomp(A.numpy(), k)
    scipy_error = np.linalg.norm(A.numpy() - sli.reconstruct_matrix_from_id(A.numpy()[:, J[:k]], J, P))
    errors = [interpolative(A, k, method="fast", seed=s).error() * float(A.norm()) for s in range(3)]
    assert len(set(errors)) == 3, "scipy gives the same columns for every seed"
    assert max(errors) <= 1.08 * scipy_error
    assert min(errors) >= best(A, k)


def test_a_column_that_is_named_twice_is_shared():
    A = randn(6, 5)
    found = interpolative(A, indices=[1, 1, 3])
    assert found.Z[:, 1].tolist() == [0.5, 0.5, 0.0] and found.Z[:, 3].tolist() == [0.0, 0.0, 1.0]
    torch.testing.assert_close(found.reconstruct(), interpolative(A, indices=[1, 3]).reconstruct())


def test_indices_that_do_not_fit():
    A = randn(3, 9)
    with pytest.raises(ConfigError, match="number of indices = 5; expected 1 to 3"):
        interpolative(A, indices=range(5))
    with pytest.raises(ConfigError, match=r"shape \(2, 2\); expected \(k,\)"):
        interpolative(A, indices=[[0, 1], [2, 3]])
    with pytest.raises(ConfigError, match="list of positions"):
        interpolative(A, indices=["a"])
    assert interpolative(torch.stack([A, A]), indices=[[0, 1], [2, 3]]).cols.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_triangle_without_an_inverse_has_its_pseudo_inverse(adjoint):
    T = torch.triu(randn(5, 5))
    T[2:] = 0  # of rank 2
    B = randn(5, 3, seed=1)
    expected = np.linalg.pinv((T.T if adjoint else T).numpy()) @ B.numpy()
    torch.testing.assert_close(apply_inverse(T, B, adjoint=adjoint), torch.from_numpy(expected))


def test_complex_results_are_plain_tensors():
    """A tensor that is conjugated only when it is read cannot become an array."""
    found = interpolative(randn(6, 5, dtype=torch.complex128), rank=2, side="rows")
    for part in (found.left, found.right, found.R, found.Z):
        assert not part.is_conj() and part.numpy().shape == part.shape
