"""Linear layers of low rank: every form against numpy, and against running the network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lowrank.matrices import randn, relative
from tests.lowrank.networks import filled, mlp
from torch import nn
from torch.nn import functional as F

from quintic.lowrank import FactoredLinear, compress
from quintic.lowrank.factored import FITS, fit_rank, prune, rank_of_share


def direct(net, made, x):
    with torch.no_grad():
        return relative(net(x), made.module(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_forms_against_numpy(bias):
    net = filled(nn.Sequential(nn.Linear(10, 8, bias=bias)))
    x = randn(200, 10, seed=1) @ torch.diag(torch.logspace(0, -1.5, 10, dtype=torch.float64)) + 0.3
    other = randn(50, 10, seed=2)
    errors = {}
    for method in FITS:
        made = compress(net, [x], keep=3, method=method, held_out=[other])
        row = made.layers[0]
        errors[method] = row.error
        assert row.error == pytest.approx(direct(net, made, x), rel=1e-6)
        assert row.held_out_error == pytest.approx(direct(net, made, other), rel=1e-6)
        assert np.linalg.matrix_rank(made.module[0].weight.detach().numpy()) == 3
        assert row.after == (10, 3, 8) and row.parameters_after == 3 * (10 + 8 - 3) + 8 * bias
        assert made.parameters_after == sum(p.numel() for p in made.module.parameters())
        assert isinstance(made.module[0], FactoredLinear) and torch.allclose(
            made.module[0](x), F.linear(x, made.module[0].weight, made.module[0].bias)
        )
    # The best linear map of rank 3: of the centred outputs if there is a constant to choose.
    Y = net(x).detach().numpy()
    spectrum = np.linalg.svd(Y - Y.mean(0) if bias else Y, compute_uv=False)
    assert errors["svd"] == pytest.approx(np.sqrt((spectrum[3:] ** 2).sum() / (Y**2).sum()), rel=1e-3)
    assert errors["svd"] < errors["id"] < errors["cur"]
    assert errors["svd"] < errors["svd-plain"]


def test_the_rows_of_an_id_and_the_spaces_of_a_cur_are_those_of_the_matrix():
    net, x = filled(nn.Sequential(nn.Linear(10, 8, bias=False))), randn(100, 10, seed=1)
    W = net[0].weight.detach()
    kept = compress(net, [x], keep=3, method="id").module[0].kept.detach()
    assert all(any(torch.equal(row, w) for w in W) for row in kept)
    made = compress(net, [x], keep=3, method="cur").module[0].weight.detach()
    inside = [j for j in range(10) if np.linalg.matrix_rank(np.column_stack([made, W[:, j]]), tol=1e-9) == 3]
    beside = [i for i in range(8) if np.linalg.matrix_rank(np.vstack([made, W[i]]), tol=1e-9) == 3]
    assert len(inside) == 3 and len(beside) == 3


def test_pruning_keeps_the_largest_weights():
    net, x = mlp(6, 10, 4), randn(30, 6)
    made = compress(net, [x], keep=0.3, method="magnitude", layers=["0"])
    W, pruned = net[0].weight.detach(), made.module[0].weight.detach()
    assert int(pruned.count_nonzero()) == 18 and made.layers[0].parameters_after == 18 + 10
    assert W[pruned == 0].abs().max() < pruned[pruned != 0].abs().min()
    assert torch.equal(pruned[pruned != 0], W[pruned != 0]) and torch.equal(made.module[2].weight, net[2].weight)


def test_pruning_keeps_the_nearest_number_of_weights_and_one_at_least():
    W = randn(3, 3)
    assert [int(prune(W, share).count_nonzero()) for share in (1e-3, 0.05, 0.1, 0.61, 0.65, 1.0)] == [1, 1, 1, 5, 6, 9]


@pytest.mark.parametrize("method", FITS)
def test_the_whole_share_changes_nothing(method):
    net, x = mlp(6, 10, 4), randn(30, 6)
    made = compress(net, [x], keep=1.0, method=method)
    torch.testing.assert_close(made.module(x), net(x))
    assert made.parameters_after == made.parameters_before


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_compact_factors_hold_any_matrix_of_the_rank(m, n, data):
    rank = data.draw(st.integers(1, min(m, n)))
    W = randn(m, n, seed=17 * m + n)
    kept, rest, order = fit_rank(W, torch.eye(n, dtype=torch.float64), rank, "svd-plain")
    layer = FactoredLinear.of(W, kept, rest, order, None)
    assert sorted(order.tolist()) == list(range(m)) and kept.numel() + rest.numel() == rank * (m + n - rank)
    left = torch.linalg.svdvals(W)[rank:]
    assert float(torch.linalg.vector_norm(W - layer.weight.detach())) == pytest.approx(float(left.norm()), abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_the_rank_of_a_share_is_the_largest_that_fits(m, n, share):
    rank = rank_of_share(m, n, share)
    assert rank == 1 or rank * (m + n - rank) <= share * m * n * (1 + 1e-6)
    assert rank == min(m, n) or (rank + 1) * (m + n - rank - 1) > share * m * n * (1 - 1e-6)
