"""The C kernels of experts, gates and activations against float64, torch's operators and themselves."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quintic.moe import expert_kernels
from quintic.moe.feedforward import FeedForward
from quintic.moe.fused import fused_feedforward
from quintic.moe.routed import routed_experts
from quintic.moe.router import argtop

pytestmark = needs_kernels


def made(n, d, f, experts, k, *, gated=True, seed=0):
    """x, ids, gates, w_in, w_out and an incoming gradient."""
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, n, d, generator=g)
    ids = torch.rand(n, experts, generator=g).argsort(1)[:, :k]
    w_in = torch.randn(experts, f * (1 + gated), d, generator=g) / d**0.5
    return x, ids, torch.rand(n, k, generator=g), w_in, torch.randn(experts, d, f, generator=g) / f**0.5, dy


def passes(x, ids, gates, w_in, w_out, dy, dtype=torch.float32, activation="silu"):
    """y and the four gradients."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (x, gates, w_in, w_out)]
    y = routed_experts(leaves[0], ids, *leaves[1:], activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.booleans(),
    st.sampled_from(["silu", "gelu_tanh", "relu"]), st.data(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_float64(n, d, f, experts, gated, activation, data):
    """Whatever the widths: whole vectors, remainders, fewer numbers than a vector has lanes."""
    k = data.draw(st.integers(1, experts))
    given_ = made(n, d, f, experts, k, gated=gated, seed=n)
    if activation == "relu":  # rounding alone decides on which side of the kink a number of 1e-8 is
        assume(torch.einsum("nd,ehd->neh", given_[0].double(), given_[3].double()).abs().min() > 1e-6)
    found, exact = (passes(*given_, dtype=dtype, activation=activation) for dtype in (torch.float32, torch.float64))
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm() + 1e-6


@pytest.mark.parametrize("experts", [1, 5])
def test_an_expert_of_many_rows_is_summed_in_parts(experts):
    given_ = made(1500, 20, 12, experts, 1)
    for a, b in zip(passes(*given_), passes(*given_, dtype=torch.float64), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_the_number_of_threads_changes_no_bit():
    given_, threads, found = made(700, 48, 40, 6, 2), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(passes(*given_))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_does_not_depend_on_its_company():
    """Nor does the order of others: rows are summed alike wherever they stand."""
    x, ids, gates, w_in, w_out, _ = made(300, 33, 24, 4, 2)
    whole = routed_experts(x, ids, gates, w_in, w_out)
    some = torch.arange(0, 300, 3)
    assert torch.equal(routed_experts(x[some], ids[some], gates[some], w_in, w_out), whole[some])


def test_an_unused_expert_has_gradients_of_exactly_zero():
    x, ids, gates, w_in, w_out, dy = made(60, 16, 8, 5, 2)
    _, _, _, dw_in, dw_out = passes(x, ids % 3, gates, w_in, w_out, dy)
    assert dw_in[3:].eq(0).all() and dw_out[3:].eq(0).all() and dw_in[:3].ne(0).any() and dw_out[:3].ne(0).any()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_id_that_is_no_experts_is_refused(wrong):
    x, ids, gates, w_in, w_out, _ = made(40, 8, 8, 4, 2)
    ids[3, 1] = wrong
    with pytest.raises(IndexError, match="there are 4 experts"):
        routed_experts(x, ids, gates, w_in, w_out)


def test_strided_inputs():
    x, ids, gates, w_in, w_out, dy = made(50, 16, 8, 4, 2)
    expected = passes(x, ids, gates, w_in, w_out, dy)
    apart = [torch.stack([t, t], dim=-1)[..., 0] for t in (x, ids, gates, w_in, w_out, dy)]
    assert not any(t.is_contiguous() for t in apart)
    leaves = [t.requires_grad_() for t in (apart[0], *apart[2:5])]
    y = routed_experts(leaves[0], apart[1], *leaves[1:])
    found = [y.detach(), *torch.autograd.grad(y, leaves, apart[5])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
def test_huge_and_missing_numbers(activation, gated):
    """Of the pre-activation: as large as they come the result is torch's, and a NaN stays one, in its own row."""
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 200.0, -200.0, 1e4, -1e4]).repeat(2, 1)
    z[1, 3] = torch.nan
    x, ids, gates = z, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    eye = torch.eye(12)
    w_in = torch.cat([eye, 0 * eye])[None] if gated else eye[None]
    if gated:  # up = 1 from a column of ones
        x = torch.cat([z, torch.ones(2, 1)], dim=1)
        w_in = torch.zeros(1, 24, 13)
        w_in[0, :12, :12], w_in[0, 12:, 12] = eye, 1.0
    w_out = torch.zeros(1, x.shape[1], 12)
    w_out[0, :12] = eye
    act = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "relu": torch.relu}[activation]
    x.requires_grad_()
    y = routed_experts(x.repeat(20, 1), ids.repeat(20, 1), gates.repeat(20, 1), w_in, w_out, activation=activation)
    expected = act(z.double())
    torch.testing.assert_close(y[0, :12].double(), expected[0], rtol=1e-6, atol=1e-30)
    assert y[1, :12].isnan().all() or y[1, :12].isnan().sum() == 1
    assert y[0].isfinite().all()
    exact = z[0].double().requires_grad_()
    (slope,) = torch.autograd.grad(act(exact).sum(), exact)
    (found,) = torch.autograd.grad(y[0, :12].sum(), x)
    torch.testing.assert_close(found[0, :12].double(), slope, rtol=2e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(17, 200), st.integers(1, 70), st.booleans(), st.data())
def test_choices_are_those_of_a_stable_sort(n, experts, whole, data):
    """Ties in order of index, NaN above all, -0 equal to 0, infinities."""
    k = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(n)
    scores = torch.randint(-2, 3, (n, experts), generator=g).float() if whole else torch.randn(n, experts, generator=g)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0):
        scores[torch.rand(n, experts, generator=g) < 0.05] = value
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(argtop(scores, k), expected)


@pytest.mark.parametrize("plus", [True, False])
def test_what_is_added_is_added_in_passing(plus):
    """To experts and to a dense network: the same sum, and its gradient as it comes in."""
    x, ids, gates, w_in, w_out, dy = made(300, 20, 12, 4, 2)
    stream = torch.randn(300, 20)
    for network in (
        lambda x, plus: routed_experts(x, ids, gates, w_in, w_out, plus_nd=plus),
        lambda x, plus: fused_feedforward(x, w_in[0], w_out[0], "silu", plus),
    ):
        leaves = x.clone().requires_grad_(), stream.clone().requires_grad_(plus)
        y = network(*leaves)
        torch.testing.assert_close(y, network(x, None) + stream, rtol=1e-5, atol=1e-5)
        y.backward(dy)
        assert torch.equal(leaves[1].grad, dy) if plus else leaves[1].grad is None
        alone = x.clone().requires_grad_()
        network(alone, None).backward(dy)
        assert torch.equal(leaves[0].grad, alone.grad)
        strided = stream.t().contiguous().t()
        assert torch.equal(network(x, strided), y)


@pytest.mark.parametrize("shape", [(5, 12), (100, 12), (2, 160, 40), (0, 8), (1000, 16), (1300, 130)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "gelu"])
@pytest.mark.parametrize("trained", ["x w_in w_out", "x", "w_in", "w_out"])
def test_a_dense_network(shape, activation, trained, monkeypatch):
    """Fused, and by torch's operators: values, the gradients that are asked for, and how much is counted for them."""
    torch.manual_seed(0)
    ffn = FeedForward(shape[-1], 150, activation=activation)
    for p in ffn.parameters():
        torch.nn.init.normal_(p)
    x, dy, results, counted = torch.randn(shape), torch.randn(shape), [], []
    leaves = {"x": x, "w_in": ffn.gate_up, "w_out": ffn.down}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    own = expert_kernels.kernels_for
    for kernels in (own, lambda *a, **k: None):
        monkeypatch.setattr(expert_kernels, "kernels_for", kernels)
        for leaf in leaves.values():
            leaf.grad = None
        with FlopCounterMode(display=False) as told:
            y = ffn(x)
            y.backward(dy)
        results.append((y, *(leaf.grad for leaf in leaves.values())))
        counted.append(told.get_total_flops())
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 2e-6 * b.norm() + 1e-12
    if trained != "w_out":  # da, which then nobody asks for, is made along with a
        assert counted[0] == counted[1]


def test_a_dense_network_in_half_precision_is_torchs():
    ffn = FeedForward(16, 24)
    ffn.requires_grad_(True)
    for p in ffn.parameters():
        torch.nn.init.normal_(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ffn(torch.randn(4, 16)).dtype == torch.bfloat16


def test_the_fused_network_is_sound_for_the_dispatcher():
    from torch.library import opcheck

    torch.manual_seed(0)
    x, w_in, w_out = torch.randn(9, 12), torch.randn(20, 12), torch.randn(12, 10)
    y, h = torch.ops.quintic.dense_forward(x, w_in, w_out, "silu")
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.quintic.dense_forward, (x, w_in, w_out, "silu"), test_utils=checks)
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        opcheck(torch.ops.quintic.dense_backward, (y, x, w_in, w_out, h, "silu", mask), test_utils=checks)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_dense_network_has_the_same_bits_for_any_number_of_threads(threads):
    torch.manual_seed(0)
    ffn, before, found = FeedForward(48, 200), torch.get_num_threads(), []
    for p in ffn.parameters():
        torch.nn.init.normal_(p)
    x, dy = torch.randn(900, 48).requires_grad_(), torch.randn(900, 48)
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            y = ffn(x)
            found.append((y, *torch.autograd.grad(y, [x, *ffn.parameters()], dy)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
