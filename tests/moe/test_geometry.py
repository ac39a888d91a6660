"""Errors of k-term approximations against direct sums and brute force; a dense network split and put together again."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quintic.core import ConfigError, DataError
from quintic.core.initial import initialize_
from quintic.moe import geometry, split_dense, splitting
from quintic.moe.activation import ACTIVATIONS
from quintic.moe.feedforward import FeedForward
from quintic.moe.splitting import DenseSplit


def vectors(tokens, n, d, seed=0):
    return torch.randn(tokens, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(v_nd, kept):
    dropped = [i for i in range(len(v_nd)) if i not in kept]
    return v_nd[dropped].sum(0).square().sum().item()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_all_errors_against_direct_sums(n, d, seed):
    v = vectors(2, n, d, seed)
    gram = geometry.gram_matrices(v)
    rank = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    ranked, best, random = geometry.ranked_errors(gram, rank), geometry.best_errors(gram), geometry.random_errors(gram)
    for t, k in itertools.product(range(2), range(n + 1)):
        kept = sorted(range(n), key=lambda i, t=t: -rank[t, i].item())[:k]
        every = [error(v[t], subset) for subset in itertools.combinations(range(n), k)]
        assert ranked[t, k].item() == pytest.approx(error(v[t], kept), abs=1e-9)
        assert best[t, k].item() == pytest.approx(min(every), abs=1e-9)
        assert random[t, k].item() == pytest.approx(sum(every) / len(every), abs=1e-9)


def test_largest_norms_are_best_among_orthogonal_vectors():
    directions = torch.linalg.qr(vectors(1, 6, 6)[0])[0]
    v = (directions * torch.tensor([3.0, 1.0, 5.0, 2.0, 0.5, 4.0], dtype=torch.float64)[:, None])[None]
    gram = geometry.gram_matrices(v)
    by_norm = geometry.ranked_errors(gram, v.norm(dim=-1))
    torch.testing.assert_close(by_norm, geometry.best_errors(gram))
    torch.testing.assert_close(by_norm, geometry.orthogonal_errors(gram))


def test_search_beyond_the_exhaustive_size_is_an_upper_bound_and_close():
    gram = geometry.gram_matrices(vectors(30, 10, 12))
    exact, found = geometry._all_subsets(gram), geometry._greedy_with_exchanges(gram)
    norms = gram.diagonal(dim1=1, dim2=2)
    by_norm = geometry.ranked_errors(gram, norms)
    assert (found >= exact - 1e-9).all() and (found <= by_norm + 1e-9).double().mean() > 0.95
    assert found.sum() < 1.1 * exact.sum() < 0.9 * by_norm.sum()


def plain(width=32, hidden=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    ffn = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
    for p in ffn.parameters():
        p.data.normal_(0, p.shape[1] ** -0.5, generator=g)
    return ffn


def gated():
    ffn = FeedForward(32, 128)
    initialize_(ffn, 0)
    return ffn


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(32, 128, bias=False)
        self.up_proj = nn.Linear(32, 128, bias=False)
        self.down_proj = nn.Linear(128, 32, bias=False)
        self.act_fn = nn.GELU("tanh")

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("make", [plain, gated, Llama])
@pytest.mark.parametrize("n", [1, 4, 16, 32])
def test_all_experts_are_the_dense_network(make, n):
    ffn = make()
    x = torch.randn(40, 32)
    layer = split_dense(ffn, n, torch.randn(100, 32)).to_moe(n)
    torch.testing.assert_close(layer(x), ffn(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_networks_of_any_dtype_keep_it_and_are_measured_alike(dtype, atol):
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    expected, split = split_dense(gated(), 8, x), split_dense(gated().to(dtype), 8, x)
    layer, some = split.to_moe(8), x[:30].to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    torch.testing.assert_close(layer(some), gated().to(dtype)(some), atol=atol, rtol=0)
    assert split.r2 == pytest.approx(expected.r2, abs=0.01)
    assert split.errors["router"] == pytest.approx(expected.errors["router"], abs=0.01)


def test_errors_are_those_of_the_layer_it_makes():
    """The reported error of the router's choice is what the built layer shows on the same held-out tokens."""
    ffn, x = plain(), torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    split = split_dense(ffn, 8, x)
    held = x[::5]
    for k in (1, 2, 5):
        y = ffn(held)
        found = (split.to_moe(k)(held) - y).square().sum() / y.square().sum()
        assert found.item() == pytest.approx(split.errors["router"][k], rel=1e-3)


def test_order_of_the_errors_and_the_report():
    split = split_dense(plain(64, 512), 16, torch.randn(800, 64, generator=torch.Generator().manual_seed(2)))
    e = split.errors
    for k in range(1, 15):  # with one dropped, the smallest norm is the best choice
        assert e["best"][k] < e["norm"][k] < e["router"][k] < e["random"][k]
    assert e["norm"][16] == 0.0 and all(len(curve) == 17 for curve in e.values())
    assert abs(e["orthogonal"][4] - e["norm"][4]) < 0.05  # random weights are nearly orthogonal
    assert 0.0 < split.r2 < 1.0 and "R^2" in repr(split) and f"{e['router'][4]:.4f}" in repr(split)


def test_the_router_finds_norms_that_are_linear_in_the_input():
    """relu experts of one neuron, all rows alike up to their length: ||v_i|| = relu(a_i x) |b_i| exactly."""
    ffn = plain(8, 4)
    ffn[1] = nn.ReLU()
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(3))
    x = x + 4.0 * (ffn[0].weight.pinverse() @ torch.ones(4)).detach()  # mostly on the linear side of every neuron
    split = split_dense(ffn, 4, x)
    assert split.r2 > 0.95
    y = ffn(x)
    rebuilt = split.to_moe(4, normalize_experts="l2")(x)
    assert (rebuilt - y).norm() / y.norm() < 0.15


def test_the_ridge_is_that_of_generalised_cross_validation():
    """Against the hat matrix written out, for every ridge that is tried."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=g, dtype=torch.float64) * torch.logspace(-2, 0, 12, dtype=torch.float64) + 1.0
    norms = x @ torch.randn(12, 3, generator=g, dtype=torch.float64) + 0.3 * torch.randn(40, 3, generator=g).double()
    centred, target = x - x.mean(0), norms - norms.mean(0)
    found = []
    for size in splitting._RIDGES:
        ridge = size * 40 * centred.square().mean() * torch.eye(12, dtype=torch.float64)
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ target)
        hat = centred @ torch.linalg.solve(centred.T @ centred + ridge, centred.T)
        score = (target - hat @ target).square().sum() / (40 - 1 - hat.trace()) ** 2
        found.append((score.item(), weight.T))
    best = min(range(len(found)), key=lambda i: found[i][0])
    assert 0 < best < len(found) - 1
    weight, offset = splitting._fit(x, norms)
    torch.testing.assert_close(weight, found[best][1])
    torch.testing.assert_close(x.mean(0) @ weight.T + offset, norms.mean(0))


@pytest.mark.parametrize("name", ["silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python"])
def test_activations_of_transformers_are_understood(name):
    act = pytest.importorskip("transformers.activations").ACT2FN[name]
    z = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(ACTIVATIONS[splitting._activation_name(act)].function(z), act(z))


def test_r2_is_around_the_mean_of_each_expert():
    """A router that knows the means alone predicts nothing, however far apart they are."""
    true = torch.tensor([[1.0, 11.0], [3.0, 9.0]])
    make = lambda predicted: DenseSplit(*torch.zeros(2, 2, 1, 1), "relu", *torch.zeros(2, 2), true, predicted)  # noqa: E731
    assert make(true.mean(0).expand(2, 2)).r2 == pytest.approx(0.0)
    assert make(true).r2 == 1.0
    assert make(torch.tensor([[1.0, 11.0], [3.0, 10.0]])).r2 == pytest.approx(1 - 1 / 4)


def test_few_tokens_for_the_width_do_not_fit_their_noise():
    """Norms of random weights are nearly unpredictable: then the mean is the best guess, and the report says so."""
    split = split_dense(plain(64, 512), 16, torch.randn(150, 64, generator=torch.Generator().manual_seed(4)))
    assert -0.1 < split.r2 < 0.3


def test_normalised_layer_trains_its_router_and_the_exact_one_does_not():
    split = split_dense(plain(), 4, torch.randn(200, 32))
    for normalize, learns in (("l2", True), (None, False)):
        layer = split.to_moe(2, normalize_experts=normalize)
        layer(torch.randn(20, 32)).sum().backward()
        gradient = layer.router.weight.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) is learns
        assert layer.experts.up.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("ffn", "n", "x", "error", "message"),
    [
        (plain(), 5, torch.randn(50, 32), ConfigError, "divide the hidden width of 128"),
        (plain(), 4, torch.randn(50, 31), DataError, "width 31"),
        (plain(), 4, torch.randn(9, 32), DataError, "9 tokens"),
        (plain(), 4, torch.randn(50, 32).fill_diagonal_(torch.inf), DataError, "not finite"),
        (nn.Linear(4, 4), 4, torch.randn(50, 4), ConfigError, "form of Linear"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), 4, torch.randn(50, 4), ConfigError, "biases"),
        (nn.Sequential(nn.Linear(4, 8, False), nn.Tanh(), nn.Linear(8, 4, False)), 4, torch.randn(50, 4), ConfigError,
         "Tanh"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(ffn, n, x, error, message):
    with pytest.raises(error, match=message):
        split_dense(ffn, n, x)
