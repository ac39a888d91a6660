"""Directions of steepest descent under Schatten norms: optimality in the dual norm, and the known ends."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from quintic.core import ConfigError
from quintic.linalg import msign, schatten_direction
from quintic.linalg.schatten import schatten_exponent

EXPONENTS = [1.0, 1.01, 1.5, 2.0, 3.0, 8.0, 100.0, torch.inf]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def schatten(A, p):
    return torch.linalg.vector_norm(torch.linalg.svdvals(A), ord=p, dim=-1)


def conjugate(p):
    return {1.0: torch.inf, torch.inf: 1.0}.get(p) or p / (p - 1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    rank=st.integers(1, 7),
    p=st.sampled_from(EXPONENTS),
    exponent=st.sampled_from([-150, 0, 150]),
    seed=st.integers(0, 100),
)
def test_attains_the_dual_norm_within_the_ball(n, m, rank, p, exponent, seed):
    """Hoelder: <G, U> <= ||G||_q ||U||_p, with equality here; random matrices of norm 1 stay below."""
    G = randn(n, rank, seed=seed) @ randn(rank, m, seed=seed + 1)
    U = schatten_direction(G * 10.0**exponent, p)
    dual = schatten(G, conjugate(p))
    assert schatten(U, p) == pytest.approx(1.0, rel=1e-9)
    assert (G * U).sum() == pytest.approx(dual.item(), rel=1e-9)
    other = randn(n, m, seed=seed + 2)
    assert (G * other).sum() / schatten(other, p) <= dual * (1 + 1e-12)


def test_ends_and_middle():
    G = randn(4, 6, 9)
    torch.testing.assert_close(schatten_direction(G, torch.inf), msign(G, method="svd"))
    norm = torch.linalg.matrix_norm(G, keepdim=True)
    torch.testing.assert_close(schatten_direction(G, 2), G / norm)
    torch.testing.assert_close(schatten_direction(G, 2 + 1e-9), G / norm)  # the SVD agrees with the short cut
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(schatten_direction(G, 1), U[..., :1] @ Vh[..., :1, :])
    torch.testing.assert_close(schatten_direction(G, 1e6), schatten_direction(G, torch.inf), atol=1e-4, rtol=0)


@pytest.mark.parametrize("p", EXPONENTS)
def test_zero_rank_deficient_and_non_finite(p):
    G = randn(4, 5, 7)
    G[1] = 0
    G[2] = randn(5, 1, seed=3) @ randn(1, 7, seed=4)
    alone = schatten_direction(G[:3], p)
    G[3, 0, 0] = torch.nan
    out = schatten_direction(G, p)
    assert not out[1].any() and out[3].isnan().all()
    torch.testing.assert_close(out[:3], alone)
    torch.testing.assert_close(out[2], G[2] / torch.linalg.matrix_norm(G[2]))  # of rank one: the same for all p
    half = schatten_direction(randn(5, 7, dtype=torch.bfloat16), p)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert schatten_direction(torch.zeros(0, 3), p).shape == (0, 3)


@pytest.mark.parametrize(
    "name", ["schatten", "schatten:", "schatten:0.5", "schatten:x", "schatten:nan", "spectral", "ky-fan:4", 3]
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="schatten:p with p from 1 to inf"):
        schatten_exponent(name)


@pytest.mark.parametrize("G", [torch.eye(2).long(), torch.eye(2) * 1j, torch.ones(3), [[1.0]]])
def test_what_is_no_matrix_is_refused(G):
    for p in (1, 2, torch.inf):
        with pytest.raises(ConfigError, match=r"\(\.\.\., n, m\), found"):
            schatten_direction(G, p)


def test_exponents():
    assert [schatten_exponent(f"schatten:{p}") for p in ("1", "2.5", "inf")] == [1.0, 2.5, torch.inf]
    with pytest.raises(ConfigError, match="from 1 to inf"):
        schatten_direction(torch.eye(2), 0.5)
