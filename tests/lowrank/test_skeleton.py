"""CUR: the best core, the intersection core, and what happens to both in floating point."""

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import best, hilbert, randn, relative, with_spectrum

from quintic.core import ConfigError
from quintic.lowrank import RULES, cur


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("rank", [5, (7, 4), (3, 6)])
def test_projection_is_the_best_core(method, rank):
    A = with_spectrum(30, 24, 0.7 ** np.arange(24), dtype=torch.complex128)
    found = cur(A, rank=rank, method=method)
    c, r = rank if isinstance(rank, tuple) else (rank, rank)
    assert found.cols.shape == (c,) and found.rows.shape == (r,) and found.rank == min(c, r)
    assert torch.equal(found.C, A[:, found.cols]) and torch.equal(found.R, A[found.rows])
    C, R = found.C.numpy(), found.R.numpy()
    expected = C @ (np.linalg.pinv(C) @ A.numpy() @ np.linalg.pinv(R)) @ R
    assert relative(expected, found.reconstruct()) < 1e-9
    assert relative(expected, found.C @ found.U @ found.R) < 1e-8
    assert found.error() == pytest.approx(relative(A, expected), rel=1e-6)


def test_no_other_core_is_better():
    A = with_spectrum(20, 18, 0.7 ** np.arange(18))
    found = cur(A, rank=4)
    for seed in range(5):
        other = found.C @ (found.U + 1e-3 * found.U.norm() * randn(4, 4, seed=seed)) @ found.R
        assert relative(A, other) > found.error()


@pytest.mark.parametrize("method", ["quality", "fast", "greedy-det", "pivoted-qr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_cross_is_the_inverse_of_the_intersection_and_reproduces_its_rows_and_columns(method, dtype):
    A = with_spectrum(30, 24, 0.7 ** np.arange(24), dtype=dtype)
    found = cur(A, rank=5, core="cross", method=method)
    inner = A[found.rows][:, found.cols]
    assert relative(found.C @ torch.linalg.solve(inner, found.R), found.reconstruct()) < 1e-10
    assert relative(torch.linalg.inv(inner), found.U) < 1e-8
    torch.testing.assert_close(found.reconstruct()[found.rows], A[found.rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.reconstruct()[:, found.cols], A[:, found.cols], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("rank", "exact"), [((5, 8), "cols"), ((8, 5), "rows")])
def test_an_oversampled_cross_is_the_pseudo_inverse_and_reproduces_the_smaller_side(rank, exact):
    A = with_spectrum(30, 24, 0.7 ** np.arange(24))
    found = cur(A, rank=rank, core="cross")
    inner = A[found.rows][:, found.cols]
    assert relative(found.C @ torch.linalg.pinv(inner) @ found.R, found.reconstruct()) < 1e-9
    assert len(set(found.rows.tolist())) == rank[1] and len(set(found.cols.tolist())) == rank[0]
    made = found.reconstruct()
    if exact == "cols":
        torch.testing.assert_close(made[:, found.cols], A[:, found.cols], atol=1e-12, rtol=0)
    else:
        torch.testing.assert_close(made[found.rows], A[found.rows], atol=1e-12, rtol=0)


def test_oversampling_brings_a_cross_nearer_to_the_projection():
    square, over = [], []
    for seed in range(10):
        A = with_spectrum(60, 50, 0.85 ** np.arange(50), seed=seed)
        square.append(cur(A, rank=8, core="cross", method="fast").error())
        over.append(cur(A, rank=(8, 16), core="cross", method="fast").error())
    assert np.mean(over) < np.mean(square)


@pytest.mark.parametrize("method", ["quality", "fast"])
def test_a_cross_is_given_the_rows_that_the_others_predict_worst(method):
    A = with_spectrum(40, 30, 0.85 ** np.arange(30))
    expected = cur(A, rank=5, core="cross", method=method).rows.tolist()
    Q = np.linalg.qr(A[:, cur(A, rank=5, core="cross", method=method).cols].numpy())[0]
    for _ in range(4):
        size = np.linalg.norm(Q @ np.linalg.pinv(Q[expected]), axis=1)
        size[expected] = -1
        expected.append(int(size.argmax()))
    assert cur(A, rank=(5, 9), core="cross", method=method).rows.tolist() == expected


def test_a_cross_completes_a_matrix_of_its_rank():
    A = randn(20, 4) @ randn(4, 30, seed=1)
    assert cur(A, rank=4, core="cross").error() < 1e-12


@pytest.mark.parametrize("core", ["projection", "cross"])
@pytest.mark.parametrize("method", ["quality", "fast", "greedy-det"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hilbert_where_the_formula_as_written_loses_everything(core, method, dtype):
    A = hilbert(400, dtype)
    found = cur(A, rank=30, core=core, method=method)
    assert relative(A, found.reconstruct()) <= (1e-5 if dtype == torch.float32 else 1e-13)
    if dtype == torch.float32:
        as_written = found.C @ (torch.linalg.pinv(found.C) @ A @ torch.linalg.pinv(found.R)) @ found.R
        assert relative(A, as_written) > 1e-4


def test_a_singular_intersection_is_cut():
    A = with_spectrum(12, 10, [1.0, 0.5])
    found = cur(A, columns=[0, 1, 2, 3], rows=[0, 1, 2, 3], core="cross")
    assert found.error() < 1e-10
    twins = torch.cat([A, A], 1)
    assert cur(twins, columns=[0, 10, 1], rows=[0, 5, 7], core="cross").error() < 1e-10
    assert cur(twins, columns=[0, 10, 1], rows=[0, 5, 7]).error() < 1e-10


def test_quality_is_near_the_best():
    A = with_spectrum(200, 160, 0.8 ** np.arange(160))
    least = best(A, 12) / A.norm()
    assert cur(A, rank=12).error() < 2.0 * least
    assert cur(A, rank=12, core="cross").error() < 3.5 * least


@pytest.mark.parametrize("core", ["projection", "cross"])
@pytest.mark.parametrize("rank", [(3, 3), (2, 3), (3, 2)])
def test_gradients_for_fixed_columns_and_rows(core, rank):
    A = randn(6, 5).requires_grad_()
    fixed = {"columns": [4, 0, 2][: rank[0]], "rows": [1, 5, 3][: rank[1]], "core": core}
    assert torch.autograd.gradcheck(lambda A: cur(A, **fixed).reconstruct(), A)


def test_a_batch_is_its_matrices_and_numpy_stays_numpy():
    A = randn(3, 10, 9)
    for core in ("projection", "cross"):
        found = cur(A, rank=(4, 5), core=core)
        alone = cur(A[1].numpy(), rank=(4, 5), core=core)
        assert isinstance(alone.U, np.ndarray) and isinstance(alone.left, np.ndarray)
        torch.testing.assert_close(found.reconstruct()[1], torch.from_numpy(alone.reconstruct()))


def test_labels_and_repr():
    found = cur(randn(3, 4), columns=[3, 0], rows=[1], row_labels=["x", "y", "z"], column_labels=list("abcd"))
    assert found.column_names == ["d", "a"] and found.row_names == ["y"]
    error = found.error()
    assert repr(found) == f"Skeleton(3 x 4, 2 columns and 1 rows, relative error {error:.3g}, method 'fixed')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "columns": [0], "rows": [0]}, "exactly one"),
        ({"columns": [0]}, "expected both"),
        ({"rank": (2, 9)}, "rows = 9; expected 1 to 5"),
        ({"rank": (0, 2)}, "columns = 0"),
        ({"rank": 0}, "rank = 0"),
        ({"rank": 2, "core": "crosss"}, "did you mean 'cross'"),
        ({"tol": 0.1, "core": "cross"}, "projection"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        cur(randn(6, 5), **options)
