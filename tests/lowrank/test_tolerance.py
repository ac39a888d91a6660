"""A tolerance is kept, with about the smallest rank that keeps it."""

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import ByProducts, hilbert, kahan, randn, relative, snn, with_spectrum

from quintic.core import ConfigError
from quintic.lowrank import RowBlocks, cur, interpolative, nystrom, svd


def random_case(seed):
    rng = np.random.default_rng(seed)
    m, n = rng.integers(5, 40, 2)
    k = min(m, n)
    values = [0.3 ** np.arange(k), 0.8 ** np.arange(k), 1 / np.arange(1, k + 1), 1 / np.arange(1, k + 1) ** 3]
    A = with_spectrum(m, n, values[seed % 4], seed=seed)
    return A, float(10 ** rng.uniform(-8, -0.3))


@pytest.mark.parametrize(
    ("decompose", "options"),
    [(f, {"method": m}) for f in (interpolative, cur) for m in ("quality", "fast", "pivoted-qr")] + [(svd, {})],
)
def test_random_matrices_in_memory(decompose, options):
    for seed in range(25):
        A, tol = random_case(seed)
        found = decompose(A, tol=tol, **options)
        assert relative(A, found.reconstruct()) <= tol * (1 + 1e-9) + 1e-15
        smallest = next(k for k in range(1, min(A.shape) + 1) if decompose(A, rank=k, **options).error() <= tol)
        assert found.rank <= max(1.2 * smallest, smallest + 1)


@pytest.mark.parametrize("decompose", [interpolative, cur, svd])
def test_random_operators_are_checked_by_fresh_probes(decompose):
    for seed in range(12):
        A, tol = random_case(seed)
        found = decompose(ByProducts(A), tol=tol)
        assert relative(A, found.reconstruct()) <= tol
        assert found.rank <= 1.35 * decompose(A, tol=tol).rank + 2


@pytest.mark.parametrize("A", [hilbert(120), kahan(80), snn(100, 80)], ids=["hilbert", "kahan", "snn"])
@pytest.mark.parametrize("tol", [0.3, 1e-3, 1e-10])
def test_hard_matrices(A, tol):
    assert relative(A, interpolative(A, tol=tol).reconstruct()) <= tol
    assert relative(A, interpolative(A, tol=tol, side="rows").reconstruct()) <= tol
    assert relative(A, interpolative(RowBlocks(A.numpy()), tol=tol, method="fast").reconstruct()) <= tol


def test_the_smallest_rank_is_found_exactly():
    A = torch.diag(0.5 ** torch.arange(40, dtype=torch.float64))
    left = 0.5 ** torch.arange(41, dtype=torch.float64)  # the error of rank k is 2^-k, but for the end of the sum
    for rank in range(1, 38):
        assert svd(A, tol=1.1 * float(left[rank])).rank == rank
        assert interpolative(A, tol=1.1 * float(left[rank]), method="pivoted-qr").rank == rank


def test_kernels():
    x = randn(40, 3)
    A = torch.exp(-torch.cdist(x, x).square() / 4)
    for tol in (0.1, 1e-4):
        assert relative(A, nystrom(A, tol=tol).reconstruct()) <= tol
        assert relative(A, nystrom(ByProducts(A), tol=tol).reconstruct()) <= tol


def test_a_batch_keeps_the_tolerance_everywhere():
    A = torch.stack([with_spectrum(20, 20, r ** np.arange(20)) for r in (0.2, 0.8)])
    found = interpolative(A, tol=1e-2)
    assert (found.error() <= 1e-2).all()
    assert found.rank == interpolative(A[1], tol=1e-2).rank > interpolative(A[0], tol=1e-2).rank


def test_a_search_by_tolerance_knows_its_error_whatever_becomes_of_the_matrix():
    A = with_spectrum(20, 15, 0.5 ** np.arange(15))
    found = interpolative(A, tol=1e-2)
    error = relative(A, found.reconstruct())
    A.zero_()
    assert f"relative error {error:.3g}" in repr(found)
    assert found.error() == pytest.approx(error)


def test_a_residual_in_a_single_direction_is_not_overlooked():
    # One direction is the worst case of an estimate from probes: its spread is the largest.
    for seed in range(40):
        U, V = (torch.linalg.qr(randn(30, 2, seed=2 * seed + i)).Q for i in (0, 1))
        A = U * torch.tensor([1.0, 0.011], dtype=torch.float64) @ V.T
        assert relative(A, svd(ByProducts(A), tol=0.01).reconstruct()) <= 0.01


def test_out_of_reach_is_an_error_not_a_bad_result():
    with pytest.raises(ConfigError, match=r"rank 20 comes nearest of those tried up to 20, and leaves .* in float64"):
        cur(randn(30, 20, dtype=torch.float32), tol=1e-12)
    with pytest.raises(ConfigError, match=r"in torch.float64; raise tol$"):
        cur(randn(30, 20), tol=1e-30)


def test_zero_has_rank_one():
    for A in (torch.zeros(4, 3), ByProducts(torch.zeros(4, 3))):
        found = interpolative(A, tol=1e-3)
        assert found.rank == 1 and found.error() == 0.0
