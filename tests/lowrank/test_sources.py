"""The same answer from every way to hold a matrix; what operators and row blocks are asked for."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from tests.lowrank.matrices import ByProducts, randn, relative, with_spectrum

from quintic.core import ConfigError, DataError
from quintic.lowrank import RULES, RowBlocks, cur, interpolative, read_once, select_columns, svd
from quintic.lowrank.source import as_source


def sparse_matrix(dtype=np.float64, m=60, n=50, seed=0):
    rng = np.random.default_rng(seed)
    S = scipy.sparse.random(m, n, density=0.2, random_state=rng, dtype=np.float64).astype(dtype)
    return S * (1 + 0.5j) if np.issubdtype(dtype, np.complexfloating) else S


WAYS = {
    "scipy csr": lambda A: scipy.sparse.csr_matrix(A),
    "scipy csc array": lambda A: scipy.sparse.csc_array(A),
    "scipy coo": lambda A: scipy.sparse.coo_matrix(A),
    "torch csr": lambda A: torch.from_numpy(A).to_sparse_csr(),
    "torch coo": lambda A: torch.from_numpy(A).to_sparse(),
    "torch operator": lambda A: ByProducts(torch.from_numpy(A)),
    "scipy operator": lambda A: scipy.sparse.linalg.aslinearoperator(A),
    "row blocks": lambda A: RowBlocks([A[:7], A[7:8], A[8:]]),
    "array in blocks": lambda A: RowBlocks(A, height=9),
    "function": lambda A: RowBlocks(lambda: (torch.from_numpy(b) for b in np.array_split(A, 4))),
}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_products_columns_rows_and_residual_are_those_of_the_matrix(way, dtype):
    A = sparse_matrix(dtype).toarray()
    source, T = as_source(WAYS[way](A)), torch.from_numpy(A)
    assert tuple(source.shape) == A.shape and source.dtype == T.dtype
    X, Y = randn(50, 3, dtype=T.dtype), randn(60, 2, dtype=T.dtype)
    torch.testing.assert_close(source.matmat(X), T @ X)
    torch.testing.assert_close(source.rmatmat(Y), T.mH @ Y)
    torch.testing.assert_close(source.H.matmat(Y), T.mH @ Y)
    at = torch.tensor([40, 3, 17])
    torch.testing.assert_close(source.columns(at).resolve_conj(), T[:, at])
    torch.testing.assert_close(source.rows(at), T[at])
    torch.testing.assert_close(source.H.columns(at), T[at].mH)
    L, R = randn(60, 3, dtype=T.dtype), X.mH
    off, whole = source.residual(L, R)
    near = 1e-12 if source.exact else 0.5
    assert float(off) == pytest.approx(float((T - L @ R).norm()), rel=near)
    assert float(whole) == pytest.approx(float(T.norm()), rel=near)


@ways
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_all_decompositions_of_all_kinds(way, dtype):
    A = sparse_matrix(dtype).toarray()
    given = WAYS[way](A)
    full = interpolative(A, rank=20).error()
    for found in (
        interpolative(given, rank=20),
        interpolative(given, rank=20, side="rows"),
        interpolative(given, rank=20, method="fast"),
        cur(given, rank=20),
        cur(given, rank=(20, 25), core="cross"),
    ):
        made = found.reconstruct()
        assert isinstance(made, torch.Tensor) == way.startswith("torch")
        assert torch.as_tensor(made).dtype == torch.from_numpy(A).dtype
        error = relative(A, made)
        assert full * 0.7 < error < full * 3
        assert found.error() == pytest.approx(error, rel=1e-3 if as_source(given).exact else 0.3)
    np.testing.assert_allclose(svd(given, rank=50).S, np.linalg.svd(A)[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", RULES)
def test_every_rule_works_by_products(method):
    A = with_spectrum(200, 150, 0.5 ** np.arange(150))
    found = interpolative(ByProducts(A), rank=6, method=method)
    error = relative(A, found.reconstruct())
    assert error == pytest.approx(relative(A, interpolative(A, indices=found.cols).reconstruct()))
    one_by_one = ("quality", "fast", "pivoted-qr", "deim", "greedy-error", "greedy-det")
    assert error < (6 if method in one_by_one else 300) * svd(A, rank=6).error()


@pytest.mark.parametrize("dtype", [np.int64, np.float16, None])
def test_operators_of_other_dtypes_are_computed_in_double_precision(dtype):
    A = np.arange(12.0).reshape(4, 3)
    operator = scipy.sparse.linalg.LinearOperator(
        A.shape, matvec=lambda x: A @ x, rmatvec=lambda x: A.T @ x, dtype=dtype
    )
    found = interpolative(operator, rank=2)
    assert found.C.dtype == np.float64
    np.testing.assert_allclose(found.reconstruct(), A, atol=1e-12)


def test_operators_are_asked_for_blocks_not_vectors():
    given = ByProducts(with_spectrum(500, 400, 0.9 ** np.arange(400)))
    interpolative(given, rank=40, method="fast")
    assert given.calls <= 6


def test_an_operator_that_gives_the_wrong_shape_or_nan():
    A = randn(8, 6)
    wrong = ByProducts(A)
    wrong.rmatmat = lambda X: A @ A.mH @ X
    with pytest.raises(DataError, match=r"product of shape \(8, \d\), expected \(6, \d\)"):
        interpolative(wrong, rank=2)
    nan = ByProducts(A)
    nan.rmatmat = lambda X: A.mH @ X * torch.nan
    with pytest.raises(DataError, match="not finite"):
        interpolative(nan, rank=2)


def test_a_memory_mapped_file_is_read_block_by_block_in_few_passes(tmp_path):
    A = with_spectrum(300, 40, 0.6 ** np.arange(40)).numpy()
    np.save(tmp_path / "A.npy", A)
    blocks = RowBlocks(np.load(tmp_path / "A.npy", mmap_mode="r"), height=50)
    assert blocks.shape == (300, 40) and blocks.passes == 0
    found = interpolative(blocks, rank=5, method="fast")
    assert blocks.passes == 5  # three to choose, one for the columns, one for the coefficients
    assert repr(found) == "Interpolation(300 x 40, rank 5, method 'fast')"
    assert blocks.passes == 5  # a debugger that shows a result reads no file
    assert found.error() == pytest.approx(relative(A, found.reconstruct()), rel=1e-9)
    assert blocks.passes == 6 and f"relative error {found.error():.3g}" in repr(found) and blocks.passes == 6
    assert found.error() < 1.6 * svd(A, rank=5).error()
    skeleton = cur(blocks, rank=5)
    np.testing.assert_array_equal(skeleton.R, A[skeleton.rows])
    with pytest.raises((ValueError, OSError)):  # the map is read-only, and was left so
        np.load(tmp_path / "A.npy", mmap_mode="r")[0, 0] = 1


def test_blocks_that_do_not_fit_or_change_are_refused():
    with pytest.raises(DataError, match=r"shape \(2, 4\) .* expected \(b, 3\)"):
        RowBlocks([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(DataError, match=r"float32.* expected .* torch.float64"):
        RowBlocks([np.ones((2, 3)), np.ones((2, 3), dtype=np.float32)])
    with pytest.raises(DataError, match="at least one row"):
        RowBlocks([])
    with pytest.raises(DataError, match="found None"):
        read_once(None, rank=1)
    with pytest.raises(ConfigError, match="height = 0; expected 1 or more"):
        RowBlocks(np.eye(3), height=0)
    with pytest.raises(DataError, match=r"shape \(1, 6, 5\)"):
        cur(RowBlocks(np.ones((1, 6, 5))), rank=1)
    with pytest.raises(DataError, match="4 rows together, expected 9"):
        interpolative(RowBlocks([np.eye(4)], shape=(9, 4)), rank=1)
    with pytest.raises(DataError, match="not finite"):
        interpolative(RowBlocks([np.eye(4), np.full((1, 4), np.nan)]), rank=1)


def test_one_pass_is_described_in_a_line():
    A = np.random.default_rng(0).normal(size=(9, 7))
    once = read_once([A], rank=3)
    assert repr(once) == (
        f"OnePass(9 x 7, rank 3, relative error about {once.error:.3g}, of its columns {once.column_error:.3g}, "
        f"of its rows {once.row_error:.3g}, method 'quality')"
    )


@pytest.mark.parametrize("decompose", [cur, interpolative, svd])
def test_rows_that_come_once_need_read_once(decompose):
    with pytest.raises(ConfigError, match="read_once"):
        decompose(iter([np.eye(3)]), rank=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_a_single_pass(dtype):
    A = with_spectrum(400, 60, 0.7 ** np.arange(60), dtype=torch.complex128).numpy()
    A = A.astype(dtype) if dtype == np.complex128 else A.real.astype(dtype)
    once = read_once((A[i : i + 33] for i in range(0, 400, 33)), rank=8)
    assert once.shape == A.shape
    least = svd(A, rank=8).error()
    column, row = relative(A, A[:, once.cols] @ once.Z), relative(A, once.X @ A[once.rows])
    skeleton = once.gather(A)
    assert max(column, row) < 3 * least and skeleton.error() < 5 * least
    assert relative(skeleton.reconstruct(), A[:, once.cols] @ once.U @ A[once.rows]) < 1e-4
    for estimate, true in ((once.column_error, column), (once.row_error, row), (once.error, skeleton.error())):
        assert 0.5 < estimate / true < 2
    assert skeleton.core == "sketched" and skeleton.C.dtype == dtype
    better = cur(A, columns=once.cols, rows=once.rows)
    assert better.error() <= skeleton.error()


def test_estimates_of_a_single_pass_are_of_the_columns_and_of_the_rows():
    A = with_spectrum(120, 40, 0.8 ** np.arange(40)).numpy()
    A[1:6] = A[0]

    def rule(sketch, k, seed):  # good columns, and rows that are all the same
        return torch.arange(k) if sketch.shape[-1] == 120 else RULES["quality"](sketch, k, seed=seed)

    estimates, true = [], []
    for seed in range(12):
        once = read_once([A], rank=6, method=rule, seed=seed)
        estimates.append([once.column_error, once.row_error, once.error])
        made = A[:, once.cols] @ once.Z, once.X @ A[once.rows], once.gather(A).reconstruct()
        true.append([relative(A, each) for each in made])
    estimates, true = (np.sqrt(np.mean(np.square(each), axis=0)) for each in (estimates, true))
    assert true[1] > 1.5 * true[0]
    np.testing.assert_allclose(estimates, true, rtol=0.2)


def test_the_size_of_the_blocks_does_not_matter():
    A = with_spectrum(50, 30, 0.7 ** np.arange(30)).numpy()
    a, b = (read_once(np.array_split(A, parts), rank=4, seed=3) for parts in (1, 7))
    np.testing.assert_array_equal(a.cols, b.cols)
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_allclose(a.Z, b.Z, atol=1e-10)


def test_mistakes_in_a_single_pass():
    with pytest.raises(DataError, match="no rows"):
        read_once(iter([]), rank=1)
    with pytest.raises(ConfigError, match="expected 1 to 3"):
        read_once(iter([np.eye(3)]), rank=4)
    with pytest.raises(DataError, match="has \\(4, 4\\)"):
        read_once(iter([np.eye(3)]), rank=1).gather(np.eye(4))


@pytest.mark.parametrize(
    "given",
    [3.0, [1.0, 2.0], np.array(["a"]), np.ones((2, 2), dtype=object), np.ones((2, 2), np.longdouble), torch.ones(4)],
)
def test_what_is_no_matrix(given):
    with pytest.raises(DataError):
        interpolative(given, rank=1)


def test_lists_and_views_are_matrices():
    A = np.asfortranarray(np.random.default_rng(0).normal(size=(12, 16)))
    for view in (A[::-1, ::2], A.T[1::3], A.astype(">f8"), A[:, ::-1], np.broadcast_to(A[0], (5, 16)), A.tolist()):
        dense = np.array(view, dtype=float)
        np.testing.assert_array_equal(select_columns(view, 1), select_columns(dense, 1))
        assert interpolative(view, rank=1).error() == pytest.approx(interpolative(dense, rank=1).error(), abs=1e-14)
    T = torch.from_numpy(A)
    for view in (T.mT, T[::2, 1:], T[0].expand(5, 16), T.mT.contiguous().mT):
        torch.testing.assert_close(interpolative(view, rank=1).Z, interpolative(view.clone(), rank=1).Z)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_an_operator_shows_its_scale(scale):
    A = with_spectrum(60, 50, 0.8 ** np.arange(50))
    for decompose in (interpolative, cur, svd):
        expected, found = (decompose(ByProducts(B), rank=6) for B in (A, A * scale))
        assert relative(A, found.reconstruct() / scale) == pytest.approx(relative(A, expected.reconstruct()), rel=1e-6)
        assert found.error() == pytest.approx(expected.error(), rel=1e-6)
    found = interpolative(ByProducts(A * scale), tol=1e-2)
    assert relative(A, found.reconstruct() / scale) <= 1e-2
    torch.testing.assert_close(found.C / scale, A[:, found.cols])
    found = cur(ByProducts(A * scale), rank=3)
    torch.testing.assert_close(found.R / scale, A[found.rows])


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e200), (np.float64, -1e200), (np.float64, 1e-200), (np.float32, 1e30)]
)
def test_rows_out_of_range_are_refused(dtype, scale):
    """A single pass cannot know the scale before the end."""
    A = (np.ones((6, 5)) * scale).astype(dtype)
    message = "squares of it leave the range.*float64" if dtype == np.float32 else "squares of it leave the range"
    with pytest.raises(DataError, match=message):
        cur(RowBlocks(A, height=4), rank=2)
    with pytest.raises(DataError, match=message):
        read_once(iter([A]), rank=2)
    assert read_once(iter([A * 0]), rank=2).error == 0.0


def test_masked_elements_are_not_taken_for_numbers():
    A = np.ma.masked_array(np.eye(4), np.eye(4) > 0)
    with pytest.raises(DataError, match="masked elements"):
        interpolative(A, rank=1)
    assert interpolative(np.ma.masked_array(np.eye(4)), rank=4).error() == 0.0


@pytest.mark.filterwarnings("ignore:Constructing a DIA matrix")
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dok", "lil", "bsr", "dia"])
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.bool_, np.complex64])
def test_scipy_matrices_of_all_forms_and_dtypes(form, kind, dtype):
    S = kind(sparse_matrix()).asformat(form)
    S = (S != 0 if dtype is np.bool_ else S * 9).astype(dtype).asformat(form)
    A = S.toarray()
    whole = A.astype(float) if A.dtype.kind in "bi" else A
    source, T = as_source(S), torch.from_numpy(whole)
    assert source.dtype == T.dtype and source.shape == A.shape
    X, Y = randn(50, 3, dtype=T.dtype), randn(60, 2, dtype=T.dtype)
    torch.testing.assert_close(source.matmat(X), T @ X)
    torch.testing.assert_close(source.rmatmat(Y), T.mH @ Y)
    np.testing.assert_allclose(cur(S, rank=50).reconstruct(), whole, atol=1e-3)


def test_scipy_elements_at_one_place_add_up_and_the_matrix_is_left_as_it_is():
    data, places = np.array([1.0, 2.0, 4.0, 8.0]), (np.array([0, 0, 1, 0]), np.array([2, 0, 1, 2]))
    coo = scipy.sparse.coo_array((data, places), (3, 3))
    unsorted = scipy.sparse.csr_array((data[[0, 1, 3, 2]], np.array([2, 0, 2, 1]), np.array([0, 3, 4, 4])), (3, 3))
    for given in (coo, unsorted):
        before = given.toarray()
        assert before[0, 2] == 9
        source = as_source(given)
        torch.testing.assert_close(source.matmat(torch.eye(3).double()), torch.from_numpy(before))
        assert given.nnz == 4 and given.data.tolist() in (data.tolist(), data[[0, 1, 3, 2]].tolist())
    assert unsorted.indices.tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("decompose", [cur, interpolative, svd])
def test_a_batch_of_sparse_matrices_is_refused(decompose):
    batch = torch.eye(4).expand(2, 4, 4).contiguous()
    for given in (batch.to_sparse(), batch.to_sparse_csr(), batch.to_sparse(2)):
        with pytest.raises(DataError, match=r"sparse matrix .m, n., found shape \(2, 4, 4\)"):
            decompose(given, rank=1)
    with pytest.raises(DataError, match=r"element \(1, 2\) is nan, which is not finite"):
        decompose(scipy.sparse.coo_array(([1.0, np.nan], ([0, 1], [0, 2])), (2, 3)), rank=1)


def test_an_operator_without_its_adjoint_and_lists_of_unequal_lengths_are_named():
    A = randn(6, 5).numpy()
    alone = scipy.sparse.linalg.LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=A.dtype)
    with pytest.raises(DataError, match=r"no product with its conjugate transpose .*expected rmatmat, or rmatvec"):
        cur(alone, rank=2)
    with pytest.raises(DataError, match="expected a matrix of numbers"):
        cur([[1.0, 2.0], [3.0]], rank=1)
