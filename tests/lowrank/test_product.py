"""Products of matrices from a few terms: choices, weights and middles against their definitions."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tests.lowrank.matrices import randn, relative

from quintic.core import ConfigError, DataError
from quintic.lowrank import cr, cur, product


def pair(n=12, terms=9, m=10, dtype=torch.float64, seed=0):
    return randn(n, terms, seed=seed, dtype=dtype), randn(terms, m, seed=seed + 1, dtype=dtype)


def terms(X, Y):
    return torch.stack([torch.outer(X[:, i], Y[i]).flatten() for i in range(X.shape[1])])


def test_top_takes_the_longest_terms():
    X, Y = pair()
    found = cr(X, Y, 4)
    assert set(found.indices.tolist()) == set(terms(X, Y).norm(dim=1).topk(4).indices.tolist())
    torch.testing.assert_close(found.reconstruct(), X[:, found.indices] @ Y[found.indices])
    assert found.error() == pytest.approx(relative(X @ Y, found.reconstruct()))
    assert "ProductSkeleton(12 x 10, rank 4" in repr(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("sizes", [(90, 9, 70), (30, 60, 20), (40, 7, 9)])  # n, l, m
@pytest.mark.parametrize("middle", ["as chosen", "full"])
def test_the_error_is_that_of_the_product_which_is_never_whole(sizes, dtype, middle, monkeypatch):
    monkeypatch.setattr(product, "PART", 100)
    X, Y = pair(*sizes, dtype)
    X = X * 0.7 ** torch.arange(sizes[1])
    whole, found = X @ Y, cr(X, Y, 5, middle=middle)
    left = whole - found.reconstruct()
    multiply, largest = torch.Tensor.__matmul__, []

    def watched(A, B):
        largest.append(A.shape[0] * B.shape[1])
        return multiply(A, B)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    off, size = found.source.residual(found.left, found.right)
    assert max(largest) < whole.numel()
    few = 1e-4 if dtype == torch.float32 else 1e-10
    assert float(size) == pytest.approx(float(whole.norm()), rel=few)
    assert float(off) == pytest.approx(float(left.norm()), rel=few)


def test_all_terms_are_the_product():
    X, Y = pair(dtype=torch.complex128)
    for middle in ("as chosen", "diagonal", "full"):
        assert cr(X, Y, 9, middle=middle).error() < 1e-13


def test_draws_are_unbiased_with_the_least_variance():
    X, Y = pair()
    X = X * torch.logspace(-1, 1, 9, dtype=torch.float64)
    v = terms(X, Y)
    made = [cr(X, Y, 3, method="sampled", seed=s) for s in range(1000)]
    mean = sum(each.reconstruct() for each in made) / len(made)
    size = v.norm(dim=1)
    variance = (size.sum() ** 2 - (X @ Y).norm() ** 2) / 3
    assert relative(X @ Y, mean) < 4 * (variance / len(made)).sqrt() / (X @ Y).norm()
    measured = np.mean([float((X @ Y - each.reconstruct()).norm() ** 2) for each in made])
    assert measured == pytest.approx(float(variance), rel=0.1)
    one = made[0]
    torch.testing.assert_close(one.weights, 1 / (3 * size[one.indices] / size.sum()))


@pytest.mark.parametrize(
    ("rank", "size", "dtype"),
    [(5, 2, torch.float64), (4, 2, torch.complex128), (3, 3, torch.complex128), (9, 2, torch.float64),
     (4, 1, torch.float64), (8, 3, torch.float64)],
)  # fmt: skip
def test_tuples_throw_away_the_smallest_sums(rank, size, dtype):
    X, Y = pair(seed=3, dtype=dtype)
    v = terms(X, Y)
    alive = set(range(9))
    while len(alive) > rank:
        count = size if len(alive) - rank >= size else 1
        alive -= set(min(combinations(sorted(alive), count), key=lambda t: float(v[list(t)].sum(0).norm())))
    assert set(cr(X, Y, rank, method="tuples", size=size).indices.tolist()) == alive


def test_pairs_that_cancel_are_thrown_away_together():
    X, Y = pair(10, 6, 8)
    X = torch.cat([X, 5 * X[:, :1], -5 * X[:, :1]], 1)
    Y = torch.cat([Y, Y[:1], Y[:1]])
    assert cr(X, Y, 6, method="tuples").error() < 1e-13 < cr(X, Y, 6).error()


def test_too_many_tuples():
    with pytest.raises(ConfigError, match="tuples of 4 out of 100"):
        cr(randn(3, 100), randn(100, 3), 2, method="tuples", size=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_diagonal_middle_is_least_squares_over_weights(dtype):
    X, Y = pair(dtype=dtype)
    found = cr(X, Y, 4, middle="diagonal")
    v = terms(X, Y)
    expected = np.linalg.lstsq(v[found.indices].T.numpy(), v.sum(0).numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weights, expected, rtol=1e-8)
    torch.testing.assert_close(found.reconstruct(), (found.C * found.weights) @ found.R)


def test_terms_of_any_size_have_their_weights():
    X, Y = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 1e-6, 1e-12, 1e-30], dtype=torch.float64))
    assert cr(X, Y, 4, middle="diagonal").weights.tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_full_middle_is_the_projection(dtype):
    X, Y = pair(dtype=dtype)
    found = cr(X, Y, 4, middle="full")
    C, R = X[:, found.indices].numpy(), Y[found.indices].numpy()
    expected = C @ np.linalg.pinv(C) @ (X @ Y).numpy() @ np.linalg.pinv(R) @ R
    assert relative(expected, found.reconstruct()) < 1e-10
    assert found.weights is None


def test_a_freer_middle_is_never_worse():
    for seed in range(10):
        X, Y = pair(seed=10 * seed)
        for method in ("top", "sampled", "tuples"):
            plain, diagonal, full = (cr(X, Y, 4, method=method, middle=m) for m in ("as chosen", "diagonal", "full"))
            assert full.error() <= diagonal.error() + 1e-12 <= plain.error() + 2e-12


def test_repeated_draws_and_dependent_terms_do_no_harm():
    X = torch.ones(4, 3, dtype=torch.float64)
    Y = torch.ones(3, 5, dtype=torch.float64)
    for middle in ("as chosen", "diagonal", "full"):
        found = cr(X, Y, 3, method="sampled", middle=middle)
        assert found.error() < 1e-12
        if middle != "as chosen":  # each once
            assert len(found.indices.unique()) == len(found.indices) < 3
    zero = torch.zeros(4, 3)
    for method in ("top", "sampled", "tuples"):
        for middle in ("as chosen", "diagonal", "full"):
            assert cr(zero, torch.zeros(3, 2), 2, method=method, middle=middle).error() == 0.0


def test_numpy_scale_and_gradients():
    X, Y = pair()
    found = cr(X.numpy() * 1e200, Y.numpy() * 1e-250, 5, middle="diagonal")
    assert isinstance(found.C, np.ndarray)
    np.testing.assert_allclose(found.C, X.numpy()[:, found.indices] * 1e200)
    np.testing.assert_allclose(found.R, Y.numpy()[found.indices] * 1e-250)
    assert found.error() == pytest.approx(cr(X, Y, 5, middle="diagonal").error())
    np.testing.assert_allclose(found.reconstruct() * 1e50, cr(X, Y, 5, middle="diagonal").reconstruct(), rtol=1e-9)
    np.testing.assert_allclose(found.C * found.weights @ found.R, found.reconstruct(), rtol=1e-9)
    X.requires_grad_()
    assert torch.autograd.gradcheck(lambda X: cr(X, Y, 5, middle="full").reconstruct(), X)


def test_factors_of_two_kinds_are_computed_in_the_wider_one():
    X, Y = pair()
    found = cr(X.float(), Y, 4)
    assert found.C.dtype == found.R.dtype == torch.float64
    torch.testing.assert_close(found.left @ found.right, X.float().double()[:, found.indices] @ Y[found.indices])


def test_the_product_itself_can_be_decomposed_without_being_formed():
    X, Y = pair(dtype=torch.complex128)
    A, at = X @ Y, torch.tensor([3, 0])
    source = cr(X * 1e200, Y * 1e-250, 4).source
    scaled = A * 1e-50
    torch.testing.assert_close(source.columns(at) * 1e50, A[:, at])
    torch.testing.assert_close(source.rows(at) * 1e50, A[at])
    for made, expected in ((source.matmat(Y.mH), scaled @ Y.mH), (source.rmatmat(X), scaled.mH @ X)):
        torch.testing.assert_close(made * source.scale * 1e50, expected * 1e50)
    assert cur(source, rank=9).error() < 1e-10


def test_mistakes_are_named():
    X, Y = pair()
    for options, message in (
        ({"rank": 10}, "expected 1 to 9"),
        ({"rank": 0}, "expected 1 to 9"),
        ({"rank": 2, "method": "tuple"}, "did you mean 'tuples'"),
        ({"rank": 2, "middle": "diag"}, "did you mean 'diagonal'"),
        ({"rank": 2, "method": "tuples", "size": 0}, "size = 0"),
        ({"rank": 2, "method": "tuples", "size": 2.0}, "size = 2.0; .* a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            cr(X, Y, **options)
    with pytest.raises(DataError, match="cannot multiply"):
        cr(X, X, 2)
    for scale in (1e200, 1e-200):
        with pytest.raises(DataError, match=r"product of X and Y leaves the range of torch\.float64"):
            cr(X * scale, Y * scale, 2)
    with pytest.raises(DataError, match=r"leaves the range of torch\.float32"):
        cr((X * 1e30).float(), (Y * 1e30).float(), 2)
    with pytest.raises(DataError, match="without a batch"):
        cr(randn(2, 3, 4), randn(2, 4, 3), 2)
