"""Where decompositions of others fail: a finite right result, or an error that says what to do."""

import re

import numpy as np
import pytest
import scipy.linalg.interpolative as sli
import scipy.sparse
import torch
from tests.lowrank.matrices import (
    ByProducts,
    best,
    duplicates,
    hilbert,
    kahan,
    outliers,
    randn,
    relative,
    snn,
    with_spectrum,
)

from quintic.core import ConfigError, DataError
from quintic.lowrank import RULES, cr, cur, interpolative, nystrom, read_once, svd

KINDS = {
    "id": lambda A, **o: interpolative(A, **o),
    "row id": lambda A, **o: interpolative(A, side="rows", **o),
    "fast id": lambda A, **o: interpolative(A, method="fast", **o),
    "cur": lambda A, **o: cur(A, **o),
    "cross": lambda A, **o: cur(A, core="cross", **o),
    "fast cross": lambda A, **o: cur(A, core="cross", method="fast", **o),
    "svd": lambda A, **o: svd(A, **o),
}
kinds = pytest.mark.parametrize("kind", KINDS)
HARD = {
    "kahan": kahan(90),
    "kahan shifted": kahan(90, shift=25),
    "kahan 0.285": kahan(60, theta=np.arccos(0.285), shift=25),
    "hilbert": hilbert(80),
    "snn": snn(80, 60),
    "outliers": outliers(60, 80, 10, 8),
    "twins": duplicates(),
    "rank 3": with_spectrum(30, 20, [1.0, 1e-3, 1e-6]),
    "zero": torch.zeros(7, 9, dtype=torch.float64),
    "one element": torch.eye(12, dtype=torch.float64) * (torch.arange(12) == 5),
    "zero columns": torch.cat([randn(9, 4), torch.zeros(9, 8, dtype=torch.float64)], 1),
    "ones": torch.ones(8, 8, dtype=torch.float64),
    "row": randn(1, 9),
    "column": randn(9, 1),
    "number": randn(1, 1),
}


def finite(found):
    parts = [found.left, found.right, *(getattr(found, name, None) for name in ("C", "Z", "U", "R"))]
    return all(np.isfinite(np.asarray(part)).all() for part in parts if part is not None)


@kinds
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_is_finite_and_bounded(kind, name, dtype):
    A = HARD[name].to(dtype)
    most = min(A.shape)
    for k in sorted({1, (most + 1) // 2, max(1, most - 1), most}):
        found = KINDS[kind](A, rank=k)
        assert finite(found)
        noise = 500 * torch.finfo(dtype).eps * A.norm()
        error = torch.linalg.vector_norm(A - found.reconstruct())
        assert error <= 4 * (k + 1) * best(A.double(), k) + noise
        assert np.isfinite(found.error())
    assert found.error() < 500 * torch.finfo(dtype).eps


@kinds
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_huge_and_tiny_matrices(kind, scale):
    A = with_spectrum(20, 16, 0.5 ** np.arange(16))
    expected, found = KINDS[kind](A, rank=5), KINDS[kind](A * scale, rank=5)
    assert finite(found)
    assert found.error() == pytest.approx(expected.error(), rel=1e-6)
    assert relative(found.reconstruct() / scale, expected.reconstruct()) < 1e-8
    sparse = KINDS[kind](scipy.sparse.csr_matrix((A * scale).numpy()), rank=5)
    assert sparse.error() < 3 * expected.error()


@kinds
def test_a_batch_of_huge_tiny_and_zero(kind):
    A = with_spectrum(10, 8, 0.5 ** np.arange(8), dtype=torch.float64)
    batch = torch.stack([A, A * 1e250, A * 1e-250, A * 0])
    found = KINDS[kind](batch, rank=3)
    assert finite(found)
    expected = KINDS[kind](A, rank=3).error()
    np.testing.assert_allclose(found.error(), [expected] * 3 + [0], rtol=1e-6)


@kinds
def test_a_zero_matrix_is_met_exactly(kind):
    found = KINDS[kind](torch.zeros(6, 5), rank=2)
    assert found.error() == 0.0 and not found.reconstruct().any()
    assert "relative error 0" in repr(found)


@kinds
def test_a_dependent_choice_is_finite(kind):
    A = duplicates(20, 3, 5)
    found = KINDS[kind](A, rank=8)  # scipy's coefficients are NaN here
    assert finite(found) and found.error() < 1e-12


@pytest.mark.parametrize("method", RULES)
def test_every_rule_gives_finite_factors_on_dependent_columns(method):
    for A in (duplicates(20, 3, 5), HARD["zero columns"], HARD["zero"]):
        for found in (interpolative(A, rank=6, method=method), cur(A, rank=6, method=method)):
            assert finite(found)


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_and_named(kind, bad):
    A = randn(6, 5)
    A[3, 2] = bad
    with pytest.raises(DataError, match=re.escape(f"element (3, 2) is {bad}")):
        KINDS[kind](A, rank=2)
    with pytest.raises(DataError, match=re.escape("element (1, 3, 2)")):
        KINDS[kind](torch.stack([randn(6, 5), A]), rank=2)
    with pytest.raises(DataError, match=re.escape("element (3, 2)")):
        KINDS[kind](scipy.sparse.csr_matrix(A.numpy()), rank=2)
    with pytest.raises(DataError, match="not finite"):
        read_once(iter([A.numpy()]), rank=2)
    with pytest.raises(DataError, match="not finite"):
        cr(A, randn(5, 3), 2)


def test_an_imaginary_part_that_is_not_finite():
    A = randn(6, 5, dtype=torch.complex128)
    A[3, 2] = complex(1.0, float("nan"))
    with pytest.raises(DataError, match=re.escape("element (3, 2)")):
        interpolative(A, rank=2)


@kinds
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 0, 4), (0, 3, 4)])
def test_empty_matrices_are_refused(kind, shape):
    with pytest.raises(DataError, match="at least one row"):
        KINDS[kind](torch.zeros(shape), rank=1)


@kinds
@pytest.mark.parametrize("rank", [0, 6, 100, -1])
def test_impossible_ranks_are_refused(kind, rank):
    with pytest.raises(ConfigError, match="expected 1 to 5"):
        KINDS[kind](randn(7, 5), rank=rank)


@kinds
def test_the_input_is_left_alone(kind):
    A = randn(9, 8)
    kept = A.clone()
    KINDS[kind](A, rank=3)
    KINDS[kind](A, rank=8)
    assert torch.equal(A, kept)
    frozen = A.numpy().copy()
    frozen.setflags(write=False)
    KINDS[kind](frozen, rank=3)


class TestWhatScipyGetsWrong:
    """Defects of scipy.linalg.interpolative 1.17, each beside what happens here."""

    def test_single_precision_and_integers(self):
        A = np.arange(30).reshape(5, 6)
        for typed in (A.astype(np.float32), A):
            with pytest.raises((TypeError, ValueError)):
                sli.interp_decomp(typed, 2)
            assert interpolative(typed, rank=2).error() < 1e-6

    def test_sparse(self):
        A = scipy.sparse.random(30, 20, density=0.3, random_state=0, format="csr")
        assert interpolative(A, rank=20).error() < 1e-13

    def test_seeds(self):
        A = randn(60, 60).numpy()
        first, second = (sli.interp_decomp(A, 10, rand=True, rng=s)[0] for s in (0, 1))
        assert np.array_equal(first, second), "scipy's random choice is not random"
        first, second = (interpolative(A, rank=10, method="fast", seed=s).cols for s in (0, 1))
        assert not np.array_equal(first, second)

    def test_zero_matrix(self):
        with np.errstate(all="ignore"):
            assert not np.isfinite(sli.interp_decomp(np.zeros((6, 5)), 2, rand=False)[1]).all()
        assert finite(interpolative(np.zeros((6, 5)), rank=2))

    def test_nan(self):
        A = np.ones((6, 5))
        A[2, 2] = np.nan
        with pytest.raises(DataError):
            interpolative(A, rank=2)

    def test_tolerance(self):
        A = hilbert(256)
        for tol in (1e-6, 1e-9, 1e-12):
            assert interpolative(A, tol=tol).error() <= tol

    def test_one_row(self):
        found = interpolative(randn(1, 7), rank=1)
        assert found.error() < 1e-15

    def test_operators_are_as_good_as_arrays(self):
        from scipy.sparse.linalg import aslinearoperator

        A = with_spectrum(200, 150, 1 / np.arange(1, 151)).numpy()
        by_products, in_memory = interpolative(aslinearoperator(A), rank=20), interpolative(A, rank=20)
        assert relative(A, by_products.reconstruct()) < 1.1 * in_memory.error()

    def test_svd_of_an_operator_that_is_not_square(self):
        from scipy.sparse.linalg import aslinearoperator

        A = with_spectrum(30, 12, 0.5 ** np.arange(12)).numpy()
        found = svd(aslinearoperator(A), tol=1e-3)
        assert relative(A, found.reconstruct()) <= 1e-3


def test_nystrom_of_hard_kernels():
    for A in (hilbert(60), torch.zeros(5, 5), torch.ones(6, 6), with_spectrum(9, 9, [1.0]) * 0 + torch.eye(9)):
        for k in (1, len(A)):
            found = nystrom(A, rank=k)
            assert finite(found)
        assert found.error() < 1e-6


@pytest.mark.parametrize("whole", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_any_kind(whole):
    A = randn(9, 8)
    for kind in KINDS.values():
        assert kind(A, rank=whole(3)).rank == 3
    assert cur(A, rank=[whole(3), whole(4)]).R.shape == (4, 8)
    assert cr(A, A.T, whole(3)).rank == read_once([A.numpy()], whole(3)).Z.shape[0] == 3
    large = randn(300, 280)
    for method in ("quality", "fast", "uniform", "k-means", "norms-sampled"):
        found = [cur(large, rank=3, method=method, seed=seed).cols for seed in (7, whole(7))]
        assert torch.equal(*found)


@pytest.mark.parametrize("rank", [3.0, "3", True, None, (3,), (3, 4, 5), (3, 2.5)])
def test_ranks_that_are_no_numbers(rank):
    with pytest.raises(ConfigError, match=r"expected 1 to 5 .*, a whole number|exactly one"):
        cur(randn(7, 5), rank=rank)


@pytest.mark.parametrize("seed", [None, "x", 1.5, 2**80])
def test_seeds_that_are_no_integers(seed):
    for method in ("fast", "uniform"):
        with pytest.raises(ConfigError, match=r"seed = .*; expected an integer"):
            cur(randn(200, 180), rank=3, method=method, seed=seed)


@pytest.mark.parametrize("seed", [1.5, 2**70])
def test_seeds_that_are_no_integers_and_are_not_used(seed):
    for kind in KINDS.values():
        with pytest.raises(ConfigError, match=r"seed = .*; expected an integer"):
            kind(randn(7, 5), rank=3, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_what_has_lost_its_digits_is_refused(dtype):
    A = randn(7, 5, dtype=dtype)
    small = A * (torch.finfo(dtype).tiny / 100)
    assert small.any()
    for given in (small, torch.stack([A, small]), scipy.sparse.csr_array(small.numpy()), ByProducts(small)):
        for kind in KINDS.values():
            with pytest.raises(DataError, match="multiply the matrix by a large number"):
                kind(given, rank=2)
    assert finite(interpolative(A * (100 * torch.finfo(dtype).tiny), rank=2))


@pytest.mark.parametrize("tol", ["0.1", float("nan"), 0.0, 1.0, [0.1]])
def test_tolerances_that_are_none(tol):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        interpolative(randn(7, 5), tol=tol)


def test_methods_that_are_none():
    with pytest.raises(ConfigError, match="unknown method 3"):
        cur(randn(7, 5), rank=2, method=3)
