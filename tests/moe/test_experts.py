"""Routed experts against a per-token loop in float64, finite differences and a dense sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.moe import dispatch, expert_kernels, routed
from quintic.moe.dispatch import Run, grouped_is_legal, kept_rows, plan_runs
from quintic.moe.experts import Experts
from quintic.moe.feedforward import FeedForward, SwiGLU
from quintic.moe.routed import routed_experts


def alone(counts):
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [Run(e, e + 1, ends[e], count) for e, count in enumerate(counts)]


def together(counts):
    """All in one run, or as it is if memory is not made for that much padding."""
    fits = len(counts) * max(counts) <= kept_rows(sum(counts), len(counts))
    return [Run(0, len(counts), 0, max(counts))] if fits else plan_runs(counts, 1, 1, cpu=False)


KERNELS = {"loop": alone, "padded": together, "grouped": None}
COMPILED = pytest.param("compiled", marks=needs_kernels)
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}


def slow(x, ids, gates, w_in, down, act=F.silu, normalize=False):
    rows = []
    for n in range(x.shape[0]):
        y = torch.zeros_like(x[n])
        for j, e in enumerate(ids[n].tolist()):
            h = w_in[e] @ x[n]
            if len(h) == down.shape[2]:
                a = act(h)
            else:
                gate, up = h.chunk(2)
                a = act(gate) * up
            v = down[e] @ a
            y = y + gates[n, j] * (v / (v.square().mean() + 1e-8).sqrt() if normalize else v)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


@pytest.fixture
def use(monkeypatch):
    """Force a kernel instead of letting sizes decide."""

    own = expert_kernels.kernels_for

    def force(kernel):
        monkeypatch.setattr(expert_kernels, "kernels_for", own if kernel == "compiled" else lambda *a, **k: None)
        if kernel == "compiled":
            return
        monkeypatch.setattr(routed, "_grouped", lambda w_in, w_out: kernel == "grouped")
        monkeypatch.setattr(routed, "plan_runs", lambda counts, *a, **k: KERNELS[kernel](counts))

    return force


def inputs(n, d, f, experts, k, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True)  # noqa: E731
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(n)]) if n else torch.empty(0, k).long()
    return make(n, d), ids, make(n, k), make(experts, 2 * f, d), make(experts, d, f)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 6), st.data())
def test_values_and_gradients_equal_the_loop(n, d, f, experts, data):
    k = data.draw(st.integers(1, experts))
    x, ids, gates, gate_up, down = inputs(n, d, f, experts, k, seed=n * 100 + d)
    tensors = (x, gates, gate_up, down)
    weight = torch.randn(n, d, dtype=torch.float64)
    fast, plain = (function(x, ids, gates, gate_up, down) for function in (routed_experts, slow))
    torch.testing.assert_close(fast, plain)
    if n:
        found, expected = (torch.autograd.grad((y * weight).sum(), tensors) for y in (fast, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", ["loop", "padded"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTS)
def test_every_form_of_expert_against_the_loop(activation, gated, normalize, kernel, use):
    use(kernel)
    x, ids, gates, gate_up, down = inputs(8, 6, 4, 5, 2, seed=3)
    w_in = gate_up if gated else gate_up[:, :4].detach().contiguous().requires_grad_()
    tensors = (x, gates, w_in, down)
    fast = routed_experts(x, ids, gates, w_in, down, activation=activation, normalize=normalize)
    plain = slow(x, ids, gates, w_in, down, ACTS[activation], normalize)
    torch.testing.assert_close(fast, plain)
    weight = torch.randn(8, 6, dtype=torch.float64)
    found, expected = (torch.autograd.grad((y * weight).sum(), tensors) for y in (fast, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


LOADS = {
    "balanced": lambda n, e, k: torch.stack([(torch.arange(k) + i * k) % e for i in range(n)]),
    "one full": lambda n, e, k: torch.stack([torch.arange(k) for _ in range(n)]),
    "skewed": lambda n, e, k: torch.stack([torch.arange(k) + (i * i % 31 == 0) * (i % (e - k + 1)) for i in range(n)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("n", "d", "f", "e", "k"), [(64, 16, 8, 8, 2), (1, 8, 8, 4, 4), (300, 8, 16, 6, 1), (40, 24, 8, 40, 3)]
)
def test_kernels_agree(n, d, f, e, k, load, dtype, use):
    """Up to rounding: which kernel ran can not be told from values or gradients."""
    x, _, gates, gate_up, down = inputs(n, d, f, e, k, dtype=torch.float32)
    tensors = [t.detach().to(dtype).requires_grad_() for t in (x, gates, gate_up, down)]
    ids, weight, results = LOADS[load](n, e, k), torch.randn(n, d).to(dtype), {}
    for kernel in KERNELS:
        use(kernel)
        y = routed_experts(tensors[0], ids, *tensors[1:])
        results[kernel] = (y, *torch.autograd.grad((y * weight).sum(), tensors))
    for kernel in ("padded", "grouped"):
        for a, b in zip(results["loop"], results[kernel], strict=True):
            assert torch.isfinite(b).all()
            assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * a.norm() + 1e-12


@pytest.mark.parametrize("trained", ["x gates w_in w_out", "gates w_in", "w_out"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_many_blocks_are_one_sum(rows, normalize, trained, monkeypatch):
    monkeypatch.setattr(dispatch, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(dispatch, "_CALL", 4000)  # runs of one expert and of several
    x, ids, gates, w_in, w_out = inputs(30, 5, 3, 12, 2)
    counts = torch.bincount(ids.flatten(), minlength=12).tolist()
    assert len(dispatch.blocks_of(plan_runs(counts, 5, 6, cpu=True), cpu=True)) > 2
    tensors = {"x": x, "gates": gates, "w_in": w_in, "w_out": w_out}
    asked = [tensors[name].requires_grad_() for name in trained.split()]
    for name in tensors.keys() - set(trained.split()):
        tensors[name].requires_grad_(False)
    fast, plain = (f(x, ids, gates, w_in, w_out, normalize=normalize) for f in (routed_experts, slow))
    torch.testing.assert_close(fast, plain)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), asked) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_neighbours_of_like_load_share_a_call():
    plan = lambda counts, cpu=True: [tuple(run[:2]) for run in plan_runs(counts, 64, 128, cpu=cpu)]  # noqa: E731
    assert plan([9, 8, 7, 8]) == [(0, 4)]
    assert plan([120, 0, 1, 3]) == [(0, 1), (1, 2), (2, 4)]
    assert plan([4000, 2500, 4000]) == [(0, 1), (1, 2), (2, 3)]
    assert plan([300, 310, 305, 300, 290]) == [(0, 4), (4, 5)]  # two threads share an even number out
    sizes = [run.size for run in plan_runs([5, 5, 9], 64, 128, cpu=True)]
    assert sizes == [5, 9]  # one that is left over leaves none of its padding behind
    assert plan([1, 1] + [0] * 62) == [(0, 2), (2, 64)]  # a decoded token must not read 62 idle experts
    assert plan([900, 1000], cpu=False) == [(0, 2)]
    assert plan([0, 0]) == [(0, 2)]


def test_where_the_grouped_product_is_legal(monkeypatch):
    cpu = torch.device("cpu")
    assert grouped_is_legal(torch.float32, (64, 128), cpu)
    assert not grouped_is_legal(torch.float64, (64, 128), cpu)
    assert not grouped_is_legal(torch.bfloat16, (64, 132), cpu)
    for capability, legal in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert grouped_is_legal(torch.bfloat16, (64, 128), torch.device("cuda")) == legal
    assert not grouped_is_legal(torch.float32, (64, 128), torch.device("mps"))


def test_a_cpu_takes_runs_and_another_device_the_grouped_product_where_its_widths_are_legal(monkeypatch):
    asked = []
    monkeypatch.setattr(routed, "grouped_is_legal", lambda *of: asked.append(of[1]) or True)
    here, there = (
        [torch.empty(4, *size, device=device) for size in ((24, 16), (16, 12))] for device in ("cpu", "meta")
    )
    assert not routed._grouped(*here) and routed._grouped(*there) and asked[-1] == (16, 24, 12)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.booleans())
def test_runs_hold_every_expert_once_within_the_memory_kept(counts, cpu):
    runs, at = plan_runs(counts, 32, 64, cpu=cpu), 0
    for run in runs:
        assert run.start == at and run.size == max(counts[run.first : run.last])
        at = run.stop
    assert [e for run in runs for e in range(run.first, run.last)] == list(range(len(counts)))
    assert sum(counts) <= at <= kept_rows(sum(counts), len(counts))


@pytest.mark.parametrize("normalize", [False, True])
def test_work_does_not_grow_with_the_number_of_experts(normalize, use):
    """Multiply-adds of the products inside, for 4 and for 64 experts; and what the operator tells a FLOP counter."""
    use("loop")
    for experts in (4, 64):
        x, _, gates, gate_up, down = inputs(256, 8, 4, experts, 2, dtype=torch.float32)
        ids = LOADS["balanced"](256, experts, 2)
        with torch.no_grad(), FlopCounterMode(display=False) as inside:
            y, *kept = routed._forward(x, ids, gates, gate_up, down, "silu", normalize)
            routed._backward(y, x, gates, gate_up, down, *kept, "silu", normalize, 3 * [True])
        with FlopCounterMode(display=False) as outside:
            routed_experts(x, ids, gates, gate_up, down, normalize=normalize).sum().backward()
        once = 2 * 256 * 2 * (3 * 4 * 8)
        assert inside.get_total_flops() == outside.get_total_flops() == 3 * once + normalize * once // 3


@pytest.fixture
def called(monkeypatch):
    """The products of experts, as torch's operators are called for them."""
    called = []
    monkeypatch.setattr(expert_kernels, "kernels_for", lambda *a, **k: None)
    for name in ("rows_by_expert_", "outer_by_expert_"):
        product = getattr(routed, name)
        monkeypatch.setattr(routed, name, lambda *a, product=product: called.append(product) or product(*a))
    return called


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("trained", ["x", "gates", "w_in", "w_out", "x gates", "x w_in", "gates w_in w_out"])
def test_gradients_that_nobody_asks_for_are_not_computed(trained, kernel, normalize, use, called):
    """Frozen experts cost no product and no room; what is asked for is the same to the last bit."""
    use(kernel)
    n, d, f, experts, k = 64, 16, 8, 4, 2
    x, _, gates, w_in, w_out = inputs(n, d, f, experts, k, dtype=torch.float32)
    ids, tensors = LOADS["balanced"](n, experts, k), {"x": x, "gates": gates, "w_in": w_in, "w_out": w_out}

    def run():
        y = routed_experts(x, ids, gates, w_in, w_out, normalize=normalize)
        called.clear()
        with FlopCounterMode(display=False) as told:
            y.square().sum().backward()
        found = {name: t.grad for name, t in tensors.items() if t.grad is not None}
        for t in tensors.values():
            t.grad = None
        return len(called), told.get_total_flops(), found

    calls, _, whole = run()
    assert calls == 4 + normalize
    for name, t in tensors.items():
        t.requires_grad_(name in trained.split())
    calls, told, found = run()
    assert calls == 1 + normalize + sum(name in trained for name in ("x", "w_in", "w_out"))
    once = 2 * n * k * d * f  # with an output projection; input projections are twice as high
    assert told == once * (1 + normalize + 2 * ("x" in trained) + 2 * ("w_in" in trained) + ("w_out" in trained))
    assert found.keys() == set(trained.split())
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_without_tokens_there_are_the_gradients_that_are_asked_for():
    x, ids, gates, w_in, w_out = inputs(0, 4, 3, 2, 2)
    w_in.requires_grad_(False)
    routed_experts(x, ids, gates, w_in, w_out).sum().backward()
    assert w_in.grad is None and w_out.grad.eq(0).all() and x.grad.shape == (0, 4)


@pytest.mark.parametrize("trained", ["x gates", "w_in w_out"])
def test_with_frozen_parts_it_compiles_as_one_graph(trained, called):
    x, ids, gates, w_in, w_out = inputs(12, 8, 4, 4, 2, dtype=torch.float32)
    tensors = {"x": x, "gates": gates, "w_in": w_in, "w_out": w_out}
    for name, t in tensors.items():
        t.requires_grad_(name in trained.split())
    torch._dynamo.reset()
    results = []
    for function in (routed_experts, torch.compile(routed_experts, fullgraph=True, backend="aot_eager")):
        y = function(x, ids, gates, w_in, w_out)
        called.clear()
        results.append(torch.autograd.grad(y.square().sum(), [t for t in tensors.values() if t.requires_grad]))
        assert len(called) == 1 + len({"x", "w_in", "w_out"} & set(trained.split()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_finite_differences():
    x, ids, gates, gate_up, down = inputs(6, 5, 3, 4, 2)
    for normalize in (False, True):
        function = lambda *a, n=normalize: routed_experts(a[0], ids, *a[1:], normalize=n)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, gates, gate_up, down))


def test_double_backward_is_refused():
    x, ids, gates, gate_up, down = inputs(3, 4, 3, 4, 2)
    (gradient,) = torch.autograd.grad(routed_experts(x, ids, gates, gate_up, down).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_for_the_backward_pass_is_input_and_projection_only():
    n, d, f, experts, k = 512, 32, 12, 16, 4
    x, ids, gates, gate_up, down = inputs(n, d, f, experts, k, dtype=torch.float32)
    given = {t.data_ptr() for t in (x, gates, gate_up, down)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed_experts(x, ids, gates, gate_up, down)
    extra = sum(t.nbytes for t in kept if t.data_ptr() not in given)
    rows = kept_rows(n * k, experts)
    assert rows <= 1.125 * n * k + 8 * experts and extra <= rows * (2 * f * 4 + 8) + (n * k + experts) * 8


def test_compiles_as_one_graph_and_new_loads_do_not_recompile():
    layer = Experts(8, 4, 4)
    initialize_(layer, 0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, _, gates, *_ = inputs(12, 8, 4, 4, 2, dtype=torch.float32)
    for load in LOADS.values():
        ids = load(12, 4, 2)
        with torch.compiler.set_stance("fail_on_recompile") if load is not LOADS["balanced"] else torch.enable_grad():
            y = compiled(x, ids, gates)
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.down))
        expected = layer(x, ids, gates)
        torch.testing.assert_close(y, expected)
        for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), (x, layer.down)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTS)
def test_dense_network_and_its_gradient(activation, gated):
    ffn = FeedForward(6, 5, activation=activation, gated=gated).double()
    initialize_(ffn, 0)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    h = x @ ffn.get_parameter(ffn.in_name).t()
    z, up = h.chunk(2, -1) if gated else (h, 1.0)
    torch.testing.assert_close(ffn(x), (ACTS[activation](z) * up) @ ffn.down.t())
    assert torch.autograd.gradcheck(ffn, x)
    with pytest.raises(ConfigError, match="unknown activation"):
        FeedForward(4, 4, activation="swish")


@pytest.mark.parametrize("kernel", ["loop", "padded"])
def test_an_expert_without_tokens_gets_an_exact_zero_gradient(kernel, use):
    use(kernel)
    x, _, gates, gate_up, down = inputs(6, 4, 3, 5, 2)
    ids = torch.tensor([[0, 1]] * 6)
    routed_experts(x, ids, gates, gate_up, down).sum().backward()  # also: a gradient of stride 0 comes in
    for weight in (gate_up, down):
        assert weight.grad[2:].eq(0).all() and weight.grad[:2].abs().sum() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_with_its_experts(kernel, use):
    """Padding multiplies zeros: nothing that a token of another expert holds may come in with it."""
    use(kernel)
    x, _, gates, gate_up, down = inputs(9, 8, 4, 3, 1, dtype=torch.float32)
    with torch.no_grad():
        x[0], x[8] = float("nan"), float("inf")
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 0]).unsqueeze(1)
    y = routed_experts(x, ids, gates, gate_up, down)
    y.backward(torch.ones_like(y))
    assert y.isfinite().all(1).tolist() == x.grad.isfinite().all(1).tolist() == [False] + 7 * [True] + [False]
    for weight in (gate_up, down):
        assert weight.grad[1:].isfinite().all() and not weight.grad[0].isfinite().all()


def test_all_experts_with_unit_gates_are_one_wide_dense_network():
    x, _, _, gate_up, down = inputs(7, 6, 4, 3, 3)
    ids = torch.arange(3).expand(7, 3)
    dense = SwiGLU(6, 12).double()
    with torch.no_grad():
        gate, up = gate_up.chunk(2, dim=1)
        dense.gate_up.copy_(torch.cat([gate.reshape(12, 6), up.reshape(12, 6)]))
        dense.down.copy_(down.transpose(0, 1).reshape(6, 12))
    torch.testing.assert_close(routed_experts(x, ids, torch.ones(7, 3).double(), gate_up, down), dense(x))


def test_tokens_and_experts_may_be_relabelled():
    x, ids, gates, gate_up, down = (t.detach() for t in inputs(12, 8, 5, 6, 2))
    y = routed_experts(x, ids, gates, gate_up, down)
    tokens, experts = torch.randperm(12), torch.randperm(6)
    torch.testing.assert_close(routed_experts(x[tokens], ids[tokens], gates[tokens], gate_up, down), y[tokens])
    label = torch.argsort(experts)
    torch.testing.assert_close(routed_experts(x, label[ids], gates, gate_up[experts], down[experts]), y)


@pytest.mark.parametrize("width", [7, 8])
def test_bfloat16_is_close_and_non_contiguous_input_works(width):
    x, ids, gates, gate_up, down = (t.detach() for t in inputs(20, width, 6, 4, 2))
    strided = x.t().contiguous().t()
    torch.testing.assert_close(
        routed_experts(strided, ids, gates, gate_up, down), routed_experts(x, ids, gates, gate_up, down)
    )
    half = routed_experts(x.bfloat16(), ids, gates, gate_up.bfloat16(), down.bfloat16())
    exact = routed_experts(x, ids, gates, gate_up, down)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() / exact.norm() < 0.02


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    layer = Experts(8, 6, 4)
    initialize_(layer, 0)
    x, ids, gates, *_ = inputs(20, 8, 6, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, ids, gates)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.gate_up.grad.dtype == torch.float32
    double = inputs(20, 8, 6, 4, 2)  # which autocast leaves alone
    exact = routed_experts(*double)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(routed_experts(*double), exact)


def test_runs_are_bitwise_repeatable():
    x, ids, gates, gate_up, down = inputs(200, 16, 8, 8, 3, dtype=torch.float32)
    results = [torch.autograd.grad(routed_experts(x, ids, gates, gate_up, down).sum(), (x, gate_up)) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
