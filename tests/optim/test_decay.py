"""Spectral weight decay: the vectors it follows, and what it does to singular values, against the SVD."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.lowrank.matrices import randn, with_spectrum

from quintic.optim.decay import follow_top_space, spectral_decay_, start_top_space, top_space_shape


def orthonormal(*shape, seed=0):
    return torch.linalg.qr(randn(*shape, seed=seed)).Q


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    rank=st.integers(1, 9),
    amount=st.floats(0.0, 2.0),
    seed=st.integers(0, 999),
)
def test_no_singular_value_grows_however_stale_the_vectors(n, m, rank, amount, seed):
    W = randn(3, n, m, seed=seed)
    _, short, r = top_space_shape(3, n, m, rank)
    V = orthonormal(3, short, r, seed=seed + 1)  # has nothing to do with W
    before = torch.linalg.svdvals(W)
    after = torch.linalg.svdvals(spectral_decay_(W, V, amount))
    assert (after <= before + 1e-12).all()


def test_above_two_a_singular_value_does_grow():
    W = with_spectrum(5, 4, [3.0, 2.0, 1.0])[None]
    V = start_top_space(W, 1)
    assert torch.linalg.svdvals(spectral_decay_(W, V, 2.5)).max() > 4.0


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_only_the_largest_singular_values_shrink_and_by_the_stated_factor(shape, rank):
    singular = [4.0, 1.0, 0.25, 0.0625]
    W = torch.stack([with_spectrum(*shape, singular, seed=seed) for seed in (0, 2)])
    V = start_top_space(W, rank)
    assert V.shape == top_space_shape(2, *shape, rank)
    want = torch.tensor([s * (0.9 if i < rank else 1.0) for i, s in enumerate(singular)], dtype=torch.float64)
    got = torch.linalg.svdvals(spectral_decay_(W.clone(), V, 0.1))[:, :4]
    torch.testing.assert_close(got, want.expand(2, 4), atol=1e-8, rtol=1e-8)


def test_it_is_a_step_along_the_gradient_of_half_the_squared_norm():
    W = with_spectrum(6, 4, [2.0, 0.7, 0.3])
    leaf = W.clone().requires_grad_()
    (torch.linalg.matrix_norm(leaf, 2) ** 2 / 2).backward()
    moved = spectral_decay_(W[None].clone(), start_top_space(W[None], 1), 0.05)[0]
    torch.testing.assert_close(moved, W - 0.05 * leaf.grad, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("rank", [1, 3])
def test_one_iteration_a_step_follows_a_moving_matrix(rank):
    """A cold start at every step, with one iteration, would miss a fifth of the norm."""
    W = randn(1, 60, 50)
    V = start_top_space(W, rank)
    for step in range(60):
        W = W + 0.01 * randn(1, 60, 50, seed=step + 1)
        V = follow_top_space(W, V)
        torch.testing.assert_close(V.mT @ V, torch.eye(rank, dtype=torch.float64)[None], atol=1e-12, rtol=0)
    seen = torch.linalg.matrix_norm(W @ V, 2)
    assert seen.item() > 0.97 * torch.linalg.matrix_norm(W, 2).item()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e18, 1e37])
def test_vectors_stay_orthonormal_at_any_scale(rank, shape, scale):
    W = randn(2, *shape, dtype=torch.float32) * scale
    V = follow_top_space(W, start_top_space(W, rank))
    torch.testing.assert_close(V.mT @ V, torch.eye(rank).expand(2, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2])
def test_zero_and_non_finite_matrices_keep_their_vectors_and_touch_no_neighbour(rank):
    W = randn(3, 5, 4)
    V = start_top_space(W, rank)
    W[0], W[1, 2, 2] = 0.0, torch.nan
    after = follow_top_space(W, V)
    assert torch.equal(after[:2], V[:2])
    torch.testing.assert_close(after[2:], follow_top_space(W[2:].clone(), V[2:].clone()))


def test_starts_are_seeded_and_not_orthogonal_to_a_top_vector_that_ones_miss():
    W = torch.zeros(1, 4, 4)
    W[0, 0, 0], W[0, 0, 1], W[0, 1, 3] = 1.0, -1.0, 0.5
    V = start_top_space(W, 1)
    assert torch.linalg.vector_norm(W @ V).item() == pytest.approx(2**0.5, rel=1e-5)
    state = torch.random.get_rng_state()
    assert torch.equal(V, start_top_space(W, 1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_vector_of_a_tiny_singular_value_stays_of_unit_length():
    """The squares of what the iteration gives are below float32's normal range here."""
    for tiny in (1e-9, 1e-10, 3e-11):
        W = torch.diag(torch.tensor([1.0, tiny, tiny / 3]))[None]
        V = torch.tensor([0.0, 0.6, 0.8])[None, :, None]
        assert torch.linalg.vector_norm(follow_top_space(W, V)).item() == pytest.approx(1.0, abs=1e-6)
