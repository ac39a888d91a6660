"""Muon against a plain float64 reference, torch.optim.Muon and torch.optim.AdamW, and against the defects of peers."""

import copy
import io
import math
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import quintic.optim.matrices as matrices_module
from quintic.core import CheckpointError, ConfigError
from quintic.core.roles import Constant, Normal, Role, declare
from quintic.linalg import msign
from quintic.optim import Muon, convert_lr

SCALE = {
    "moonlight": lambda n, m: 0.2 * max(n, m) ** 0.5,
    "keller": lambda n, m: max(1.0, n / m) ** 0.5,
    "mup": lambda n, m: (n / m) ** 0.5,
    "none": lambda n, m: 1.0,
}
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def reference_step(w, g, b, *, lr, wd, mu=0.95, nesterov=True, scale="moonlight"):
    """Post 10592 with a shape factor, sum form of the momentum, matrix by matrix, in float64."""
    b = mu * b + g
    x = g + mu * b if nesterov else b
    x = x / max(x.norm().item(), 1e-300)
    for a3, b3, c3 in QUINTIC:
        gram = x @ x.T
        x = a3 * x + (b3 * gram + c3 * gram @ gram) @ x
    return w - lr * (SCALE[scale](*w.shape) * x + wd * w), b


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(*shapes, seed=0, dtype=torch.float32):
    return [nn.Parameter(randn(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def set_grads(params, seed, scale=1.0):
    for i, p in enumerate(params):
        p.grad = (randn(*p.shape, seed=1000 * seed + i, dtype=torch.float64) * scale).to(p.dtype)


def snapshot(params):
    return [p.detach().clone() for p in params]


def run(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, step + 1)
        optimizer.step()


class Model(nn.Module):
    """One parameter of every role, declared."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, shape, role in [
            ("embed", (11, 6), Role.EMBEDDING),
            ("proj", (8, 6), Role.MATRIX),
            ("square", (6, 6), Role.MATRIX),
            ("experts", (3, 8, 6), Role.EXPERT_STACK),
            ("router", (3, 6), Role.ROUTER),
            ("gain", (6,), Role.VECTOR),
            ("head", (11, 6), Role.HEAD),
        ]:
            setattr(self, name, nn.Parameter(randn(*shape, seed=len(name), dtype=dtype)))
            declare(self, name, role, Constant(1.0) if role is Role.VECTOR else Normal(0.02))


# ---------------------------------------------------------------- the rule


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    scale=st.sampled_from(sorted(SCALE)),
    nesterov=st.booleans(),
    mu=st.sampled_from([0.0, 0.5, 0.95]),
    wd=st.sampled_from([0.0, 0.1]),
)
def test_equals_the_reference_in_float64(n, m, scale, nesterov, mu, wd):
    p = nn.Parameter(randn(n, m, dtype=torch.float64))
    optimizer = Muon([p], lr=0.02, weight_decay=wd, momentum=mu, nesterov=nesterov, scale=scale)
    w, b = p.detach().clone(), torch.zeros(n, m, dtype=torch.float64)
    for step in range(4):
        set_grads([p], step + 1)
        w, b = reference_step(w, p.grad, b, lr=0.02, wd=wd, mu=mu, nesterov=nesterov, scale=scale)
        optimizer.step()
    torch.testing.assert_close(p.detach(), w, atol=1e-10, rtol=1e-10)


def test_stacks_are_orthogonalised_slice_by_slice():
    """HeavyBall 3.2.1 and pytorch_optimizer 4.1.0 flatten to (E, out * in): slices then end far from orthogonal."""
    (stack,) = parameters((4, 32, 64), dtype=torch.float64)
    singles = [nn.Parameter(s.clone()) for s in stack.detach()]
    a, b = Muon([stack], lr=0.1), Muon(singles, lr=0.1)
    for step in range(3):
        set_grads([stack], step + 1)
        for single, g in zip(singles, stack.grad, strict=True):
            single.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))

    (stack,) = parameters((4, 32, 64))
    before = stack.detach().clone()
    set_grads([stack], 1)
    Muon([stack], lr=1.0, weight_decay=0.0, scale="none").step()
    singular = torch.linalg.svdvals(before - stack.detach())
    assert singular.min() > 0.9
    assert singular.max() < 1.1


def test_convolutions_are_one_matrix_with_the_scale_of_that_matrix():
    """Keller's code takes the factor from the kernel axes: 1.07 instead of sqrt(256 / 27) for (256, 3, 3, 3)."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(randn(256, 3, 3, 3).to(memory_format=memory_format))
        p.grad = randn(256, 3, 3, 3, seed=1).to(memory_format=memory_format)
        before = p.detach().clone()
        Muon([{"params": [p], "layout": "conv"}], lr=1.0, weight_decay=0.0, scale="keller").step()
        top = torch.linalg.matrix_norm((before - p.detach()).reshape(256, 27), 2)
        assert top == pytest.approx(math.sqrt(256 / 27), rel=0.05)


def test_rms_scale_has_exactly_the_rms_it_promises_at_any_rank():
    (p,) = parameters((24, 40))
    before = p.detach().clone()
    p.grad = randn(24, 2) @ randn(2, 40, seed=1)
    Muon([p], lr=1.0, weight_decay=0.0, scale="rms").step()
    assert (before - p.detach()).square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


def test_moonlight_update_has_the_rms_of_adam():
    for shape in ((64, 64), (32, 128), (128, 32)):
        (p,) = parameters(shape)
        before = p.detach().clone()
        set_grads([p], 1)
        Muon([p], lr=1.0, weight_decay=0.0).step()
        assert (before - p.detach()).square().mean().sqrt() == pytest.approx(0.2, rel=0.03)


def test_average_form_of_the_momentum_matches_torch_and_the_sum_form_up_to_its_factor():
    (p,) = parameters((6, 9), dtype=torch.float64)
    optimizer = Muon([p], momentum=0.9)
    total = torch.zeros(6, 9, dtype=torch.float64)
    for step in range(5):
        set_grads([p], step + 1)
        total = 0.9 * total + p.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"] / (1 - 0.9), total)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_agrees_with_torch_optim_muon_given_its_keywords(shape, adjust, nesterov):
    """torch works in bfloat16: single steps agree to its precision; the momenta agree to float32's."""
    keywords = {
        "lr": 0.02,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": nesterov,
        "ns_coefficients": (3.4445, -4.7750, 2.0315),
        "eps": 1e-7,
        "ns_steps": 5,
        "adjust_lr_fn": adjust,
    }
    (ours,) = parameters(shape)
    theirs = nn.Parameter(ours.detach().clone())
    a, b = Muon([ours], **keywords), torch.optim.Muon([theirs], **keywords)
    for step in range(3):
        set_grads([ours], step + 1)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs - parameters(shape)[0]).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    torch.testing.assert_close(a.state[ours]["momentum_buffer"], b.state[theirs]["momentum_buffer"])


def test_continues_from_a_torch_optim_muon_checkpoint():
    (p,) = parameters((8, 12))
    theirs = torch.optim.Muon([p], lr=0.02, nesterov=True)
    run([p], theirs, 3)
    q = nn.Parameter(p.detach().clone())
    ours = Muon([q], lr=0.02)
    state = theirs.state_dict()
    merged = ours.state_dict()
    merged["state"] = state["state"]
    ours.load_state_dict(merged)
    torch.testing.assert_close(ours.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"])


def test_decay_uses_the_base_rate_and_bounds_the_norm():
    """||W||_2 <= max(||W_0||_2, s / lambda): post 10739."""
    (p,) = parameters((8, 8), dtype=torch.float64)
    bound = max(torch.linalg.matrix_norm(p.detach(), 2).item(), 1.0 / 0.5)
    optimizer = Muon([p], lr=0.2, weight_decay=0.5, scale="none", coefficients="exact")
    direction = randn(8, 8, seed=5, dtype=torch.float64)
    for step in range(100):
        p.grad = direction + 0.1 * randn(8, 8, seed=step, dtype=torch.float64)
        optimizer.step()
        assert torch.linalg.matrix_norm(p.detach(), 2) <= bound * (1 + 1e-6)

    (zero_gradient,) = parameters((4, 64))
    expected = zero_gradient.detach() * (1 - 0.01 * 0.1)
    zero_gradient.grad = torch.zeros(4, 64)
    Muon([zero_gradient], lr=0.01, weight_decay=0.1).step()  # a scaled decay would differ by 0.2 * 8
    torch.testing.assert_close(zero_gradient.detach(), expected)


def test_loss_scale_does_not_matter():
    """torch.optim.Muon: 0.27 of the step for gradients of std 1e-10 on 16 x 32, none for 1e-20 or 1e19."""
    updates = []
    for exponent in (-30, -20, -10, 0, 10, 19, 30):
        (p,) = parameters((16, 32))
        set_grads([p], 1, scale=10.0**exponent)
        before = p.detach().clone()
        Muon([p], lr=1.0, weight_decay=0.0).step()
        updates.append(before - p.detach())
    for update in updates:
        torch.testing.assert_close(update, updates[3], atol=1e-4, rtol=1e-4)


def test_float64_is_computed_in_float64():
    """torch.optim.Muon: orthogonality error 6.6e-3 after 40 convergent steps."""
    (p,) = parameters((12, 12), dtype=torch.float64)
    before = p.detach().clone()
    set_grads([p], 1)
    Muon([p], lr=1.0, weight_decay=0.0, scale="none", coefficients="exact").step()
    update = before - p.detach()
    assert (update @ update.T - torch.eye(12)).abs().max() < 1e-12


def test_maximize_is_the_mirror_image():
    a, b = parameters((6, 8)), parameters((6, 8))
    x, y = Muon(a, lr=0.1, weight_decay=0.0), Muon(b, lr=0.1, weight_decay=0.0, maximize=True)
    before = a[0].detach().clone()
    run(a, x, 1)
    run(b, y, 1)
    torch.testing.assert_close(a[0] - before, before - b[0])


def test_ns_dtype_and_method_reach_msign():
    (p,) = parameters((8, 16))
    set_grads([p], 1)
    for keywords in ({"ns_dtype": torch.bfloat16}, {"method": "svd"}, {"coefficients": "keller", "ns_steps": 3}):
        (q,) = parameters((8, 16))
        q.grad = p.grad
        Muon([q], lr=1.0, weight_decay=0.0, scale="none", momentum=0.0, **keywords).step()
        expected = msign(
            p.grad,
            method=keywords.get("method", "auto"),
            dtype=keywords.get("ns_dtype"),
            coefficients=keywords.get("coefficients", "quintic"),
            steps=keywords.get("ns_steps"),
        )
        torch.testing.assert_close(p.detach() - q.detach(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the AdamW half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_half_is_torch_adamw(dtype, maximize):
    shapes = [(7,), (5, 3), (), (4, 3, 2)]
    ours, fused, plain = (parameters(*shapes, dtype=dtype) for _ in range(3))
    keywords = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    optimizers = (
        Muon([{"params": ours, "algorithm": "adamw"}], lr=3e-3, weight_decay=0.1, maximize=maximize),
        torch.optim.AdamW(fused, fused=True, **keywords),
        torch.optim.AdamW(plain, foreach=False, **keywords),
    )
    for params, optimizer in zip((ours, fused, plain), optimizers, strict=True):
        run(params, optimizer, 20)
    for a, b, c in zip(ours, fused, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=1e-6)


def test_adamw_half_keeps_other_strides_right():
    """The fused kernel walks memory in order and would pair the wrong elements."""
    values = randn(6, 4)
    plain = nn.Parameter(values.clone())
    strided = [
        nn.Parameter(values.T.contiguous().T),
        nn.Parameter(values.repeat_interleave(2, 1)[:, ::2]),
        nn.Parameter(values.clone()),
    ]
    for step in range(3):
        g = randn(6, 4, seed=step + 1)
        plain.grad = g.clone()
        for p, grad in zip(strided, (g, g, g.T.contiguous().T), strict=True):
            p.grad = grad.clone() if p is not strided[2] else grad
        if step == 0:
            a = Muon([{"params": [plain], "algorithm": "adamw"}])
            b = Muon([{"params": strided, "algorithm": "adamw"}])
        a.step()
        b.step()
    for p in strided:
        assert torch.equal(p, plain)


def test_both_halves_share_rate_and_decay():
    model = Model()
    optimizer = Muon(model, lr=0.125, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():  # gains decay too: Moonlight, appendix D
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.0625))


# ---------------------------------------------------------------- batching, order, memory


SHAPES = [(8, 6), (3, 8, 6), (6, 6), (8, 6), (2, 6, 6), (6, 8), (5, 20), (1, 7), (7, 1)]


def test_batched_equals_looped_for_any_order_and_any_cap(monkeypatch):
    together = parameters(*SHAPES, dtype=torch.float64)
    run(together, Muon(together, lr=0.05), 3)

    alone = parameters(*SHAPES, dtype=torch.float64)
    optimizers = [Muon([p], lr=0.05) for p in alone]
    backwards = parameters(*SHAPES, dtype=torch.float64)
    reverse = Muon(backwards[::-1], lr=0.05)
    capped = parameters(*SHAPES, dtype=torch.float64)
    small = Muon(capped, lr=0.05)
    for step in range(3):
        for params in (alone, backwards, capped):
            set_grads(params, step + 1)
        for optimizer in optimizers:
            optimizer.step()
        reverse.step()
        with monkeypatch.context() as patch:
            patch.setattr(matrices_module, "_STACK_BYTES", 2 * 8 * 6 * 8)  # two matrices at a time: the stack is cut
            small.step()
    for a, b, c, d in zip(together, alone, backwards, capped, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(a, c, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(a, d, atol=1e-12, rtol=1e-12)


def test_float32_does_not_depend_on_the_order_of_parameters():
    a, b = parameters((16, 16), (16, 16), (4, 16, 16)), parameters((16, 16), (16, 16), (4, 16, 16))
    x, y = Muon(a), Muon([b[2], b[0], b[1]])
    run(a, x, 3)
    run(b, y, 3)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def test_same_shapes_share_one_call_of_msign(monkeypatch):
    calls = []

    def spy(stack, **keywords):
        calls.append(tuple(stack.shape))
        return msign(stack, **keywords)

    monkeypatch.setattr(matrices_module, "msign", spy)
    params = parameters(*SHAPES)
    set_grads(params, 1)
    Muon(params).step()
    assert sorted(calls) == sorted([(5, 8, 6), (3, 6, 6), (1, 6, 8), (1, 5, 20), (1, 1, 7), (1, 7, 1)])


def test_extra_memory_is_capped(monkeypatch):
    """No stack exceeds the cap unless a single matrix does; slices of a large expert stack are taken in turns."""
    sizes = []

    def spy(stack, **keywords):
        sizes.append(len(stack))
        return msign(stack, **keywords)

    monkeypatch.setattr(matrices_module, "msign", spy)
    monkeypatch.setattr(matrices_module, "_STACK_BYTES", 3 * 8 * 6 * 4 + 1)
    params = parameters((8, 8, 6), (8, 6), (8, 6), (6, 8, 6))
    set_grads(params, 1)
    Muon(params).step()
    assert max(sizes) == 3
    assert sum(sizes) == 16
    sizes.clear()
    monkeypatch.setattr(matrices_module, "_STACK_BYTES", 1)
    Muon(params).step()
    assert sizes == [1] * 16


def test_deterministic():
    results = []
    for _ in range(2):
        params = parameters(*SHAPES)
        run(params, Muon(params), 4)
        results.append(snapshot(params))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- gradients


def test_gradients_are_only_read():
    """Keller's Muon and pytorch_optimizer overwrite p.grad under Nesterov."""
    model = Model()
    optimizer = Muon(model)
    for step in range(2):
        set_grads(list(model.parameters()), step + 1)
        before = {n: (p.grad.clone(), p.grad._version, p.grad.data_ptr()) for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            value, version, pointer = before[name]
            assert torch.equal(p.grad, value)
            assert (p.grad._version, p.grad.data_ptr()) == (version, pointer)


def test_parameters_without_gradient_are_untouched():
    """Keller's Muon decays them and their momentum."""
    model = Model()
    optimizer = Muon(model, lr=0.1)
    params = list(model.parameters())
    run(params, optimizer, 1)
    for frozen in ("proj", "embed", "experts"):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        states = copy.deepcopy({k: dict(v) for k, v in optimizer.state.items()})
        set_grads(params, 7)
        p = getattr(model, frozen)
        p.grad = None
        optimizer.step()
        for name, q in model.named_parameters():
            assert torch.equal(q, before[name]) == (name == frozen)
        for key, value in states.items():
            if key is p:
                assert all(torch.equal(v, optimizer.state[p][k]) for k, v in value.items())


def test_the_update_does_not_depend_on_which_others_have_gradients():
    a, b = parameters((8, 6), (8, 6), dtype=torch.float64), parameters((8, 6), (8, 6), dtype=torch.float64)
    x, y = Muon(a), Muon(b)
    set_grads(a, 1)
    set_grads(b, 1)
    b[0].grad = None
    x.step()
    y.step()
    torch.testing.assert_close(a[1], b[1], atol=1e-13, rtol=0)


def test_late_gradients_start_a_fresh_momentum():
    model = Model()
    model.proj.requires_grad_(False)
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert model.proj not in optimizer.state
    model.proj.requires_grad_(True)
    model.proj.grad = torch.ones_like(model.proj)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[model.proj]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["proj", "experts", "embed"])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(bad, where):
    """torch.optim.Muon: one NaN element makes every weight of the matrix NaN and poisons the momentum for ever."""
    model, twin = Model(), Model()
    a, b = Muon(model, lr=0.1), Muon(twin, lr=0.1)
    run(list(model.parameters()), a, 2)
    run(list(twin.parameters()), b, 2)
    set_grads(list(model.parameters()), 9)
    getattr(model, where).grad.view(-1)[1] = bad
    before, state = snapshot(model.parameters()), copy.deepcopy(a.state_dict())
    with pytest.warns(UserWarning, match="not finite"):
        a.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for key, value in a.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][key][name]) for name, v in value.items())
    assert a.skipped_steps == 1
    run(list(model.parameters()), a, 2, start=2)  # as if nothing had happened
    run(list(twin.parameters()), b, 2, start=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert (a.skipped_steps, b.skipped_steps) == (1, 0)


def test_a_non_finite_first_gradient_leaves_no_trace():
    model = Model()
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    before = snapshot(model.parameters())
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(v.count_nonzero() == 0 for s in optimizer.state.values() for v in s.values())


def test_zero_gradients_move_nothing_but_decay():
    for wd in (0.0, 0.1):
        params = parameters((4, 6), (2, 4, 6))
        before = snapshot(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        params[1].grad[1] = 1.0
        Muon(params, lr=0.5, weight_decay=wd).step()
        torch.testing.assert_close(params[0].detach(), before[0] * (1 - 0.5 * wd))
        torch.testing.assert_close(params[1].detach()[0], before[1][0] * (1 - 0.5 * wd))
        assert params[1].isfinite().all()


def test_awkward_shapes_and_strides():
    base = randn(10, 12)
    params = [
        nn.Parameter(base.T.contiguous().T),
        nn.Parameter(base.repeat_interleave(2, 1)[:, ::2]),
        nn.Parameter(torch.empty(0, 5)),
        nn.Parameter(randn(1, 1)),
    ]
    plain = nn.Parameter(base.clone())
    g = randn(10, 12, seed=3)
    params[0].grad, params[1].grad, plain.grad = g.clone(), g.T.contiguous().T, g.clone()
    params[2].grad, params[3].grad = torch.empty(0, 5), torch.tensor([[-4.0]])
    one = params[3].item()
    Muon(params, lr=0.1, weight_decay=0.0).step()
    Muon([plain], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(params[0], plain)
    torch.testing.assert_close(params[1], plain)
    assert params[3].item() == pytest.approx(one + 0.1 * 0.2)  # 1 x 1: sign descent


def test_expanded_gradients():
    (p,) = parameters((4, 6))
    p.grad = torch.ones(1, 1).expand(4, 6)
    q = nn.Parameter(p.detach().clone())
    q.grad = torch.ones(4, 6)
    Muon([p]).step()
    Muon([q]).step()
    assert torch.equal(p, q)


def test_sparse_gradients_are_named_in_the_error():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 10))
    optimizer = Muon(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"'0\.weight' is sparse.*sparse=False"):
        optimizer.step()


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_half_precision_weights_have_float32_state_and_follow_float32(dtype, nesterov):
    """torch.optim.Muon with nesterov=False normalises a bfloat16 momentum in place: its norm is 1 after each step."""
    half, full = Model(dtype), Model(dtype).float()
    a, b = (Muon(model, lr=0.05, nesterov=nesterov) for model in (half, full))
    for step in range(3):
        set_grads(list(half.parameters()), step + 1)
        for p, q in zip(full.parameters(), half.parameters(), strict=True):
            p.grad = q.grad.float()
        a.step()
        b.step()
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        assert p.dtype == dtype
        for key, value in a.state[p].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, b.state[q][key], msg=f"{name} {key}")
        # three roundings of weights of order 1
        torch.testing.assert_close(p.float(), q, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_parameters_of_one_shape_may_differ_in_dtype():
    def mixed():
        return [nn.Parameter(randn(4, 6, seed=i).to(d)) for i, d in enumerate((torch.float32, torch.bfloat16) * 2)]

    together, alone = mixed(), mixed()
    run(together, Muon(together), 2)
    optimizers = [Muon([p]) for p in alone]
    for step in range(2):
        set_grads(alone, step + 1)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(together, alone, mixed(), strict=True):
        assert not torch.equal(p, start)
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-5)


def test_long_runs_in_bfloat16_count_beyond_256_and_survive_a_reload():
    p = nn.Parameter(randn(4, 4).bfloat16())
    optimizer = Muon([{"params": [p], "algorithm": "adamw"}], lr=1e-3)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    other = Muon([{"params": [p], "algorithm": "adamw"}], lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[p]["step"].item() == 300
    assert other.state[p]["exp_avg"].dtype == torch.float32


# ---------------------------------------------------------------- being a torch optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", ["dict", "file", "pickle", "deepcopy"])
def test_resume_is_bit_exact(through, dtype):
    straight = Model(dtype)
    optimizer = Muon(straight, lr=0.05)
    run(list(straight.parameters()), optimizer, 3)
    if through == "deepcopy":
        model, resumed = copy.deepcopy((straight, optimizer))
    else:
        model = Model(dtype)
        model.load_state_dict(straight.state_dict())
        resumed = Muon(model, lr=0.99, weight_decay=0.7)  # overwritten by the state dict
        state = optimizer.state_dict()
        if through == "pickle":
            state = pickle.loads(pickle.dumps(state))
        elif through == "file":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(state)
    run(list(straight.parameters()), optimizer, 3, start=3)
    run(list(model.parameters()), resumed, 3, start=3)
    for p, q in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state[p].items())


def test_foreign_states_are_refused():
    (p,) = parameters((4, 6))
    optimizer = Muon([("w", p)])
    run([p], optimizer, 1)
    with pytest.raises(CheckpointError, match=r"not a state of quintic's Muon.*scale"):
        optimizer.load_state_dict(torch.optim.Muon([p]).state_dict())
    other = Muon([("w", nn.Parameter(torch.zeros(6, 4)))])
    with pytest.raises(CheckpointError, match=r"momentum_buffer of 'w' has shape \(4, 6\)"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="group"):
        Muon(parameters((4, 6), (4, 6))).load_state_dict(optimizer.state_dict())


def test_a_loaded_state_is_a_copy():
    a, b = parameters((4, 6)), parameters((4, 6))
    x, y = Muon(a), Muon(b)
    run(a, x, 1)
    y.load_state_dict(x.state_dict())
    kept = x.state[a[0]]["momentum_buffer"].clone()
    run(b, y, 1)
    assert torch.equal(x.state[a[0]]["momentum_buffer"], kept)


def test_pickle_keeps_the_table_and_the_count():
    optimizer = Muon(Model())
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.roles == optimizer.roles
    assert again.skipped_steps == 0
    run([p for g in again.param_groups for p in g["params"]], again, 1)


def test_names_are_in_the_state_dict():
    model = Model()
    groups = Muon(model).state_dict()["param_groups"]
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(n for n, _ in model.named_parameters())
    named = Muon([("w", nn.Parameter(randn(3, 4)))])
    assert named.state_dict()["param_groups"][0]["param_names"] == ["w"]


def test_closure_hooks_and_schedulers():
    (p,) = parameters((4, 6))
    optimizer = Muon([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().square().sum()
    assert optimizer.step(closure) == before
    assert seen == ["pre", "post"]
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    momenta = set()
    for _ in range(9):
        optimizer.step(closure)
        one_cycle.step()
        momenta.add(optimizer.param_groups[0]["momentum"])
    assert len(momenta) > 2
    assert p.square().sum() < before


def test_the_rate_may_be_a_tensor_and_is_read_at_each_step():
    for lr in (torch.tensor(0.05), torch.tensor([0.05])):
        a, b = Model(), Model()
        x, y = Muon(a, lr=lr), Muon(b, lr=0.05)
        run(list(a.parameters()), x, 1)
        run(list(b.parameters()), y, 1)
        lr.fill_(0.01)
        for g in y.param_groups:
            g["lr"] = 0.01
        run(list(a.parameters()), x, 1, start=1)
        run(list(b.parameters()), y, 1, start=1)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_lr_zero_leaves_weights():
    model = Model()
    before = snapshot(model.parameters())
    run(list(model.parameters()), Muon(model, lr=0.0), 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_grad_scaler_with_an_overflow_leaves_the_momentum():
    (p,) = parameters((4, 6))
    optimizer = Muon([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * randn(4, 6, seed=1)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    kept, weights = optimizer.state[p]["momentum_buffer"].clone(), p.detach().clone()
    p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], kept)
    assert torch.equal(p, weights)


def test_no_value_is_read_from_the_device_during_a_step():
    """Tensors of the meta device have no values, so reading one raises."""
    model = Model().to("meta")
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError):
        assert optimizer.skipped_steps


def test_add_param_group():
    a, b, c = parameters((4, 6), (5, 5), (7,))
    optimizer = Muon([a], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.3, "scale": "mup"})
    optimizer.add_param_group({"params": [c], "algorithm": "adamw"})
    run([a, b, c], optimizer, 2)
    assert {"momentum_buffer"} == optimizer.state[b].keys()
    assert {"step", "exp_avg", "exp_avg_sq"} == optimizer.state[c].keys()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": torch.ones(2)}, "0-d tensor"),
        ({"momentum": 1.5}, "momentum = 1.5"),  # torch.optim.Muon accepts it
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"scale": "moonlit"}, "did you mean 'moonlight'"),
        ({"method": "grm"}, "did you mean 'gram'"),
        ({"coefficients": "quntic"}, "did you mean 'quintic'"),
        ({"ns_coefficients": (1.0, 2.0)}, "triple"),
        ({"ns_steps": 0}, "from 1 to 100"),
        ({"adjust_lr_fn": "match_rms"}, "did you mean 'match_rms_adamw'"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\]"),
        ({"adamw_eps": -1.0}, "adamw_eps"),
    ],
)
def test_wrong_settings_are_refused_at_construction(keywords, message):
    with pytest.raises(ConfigError, match=message):
        Muon(parameters((3, 4)), **keywords)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [nn.Parameter(torch.zeros(5))]}, r"\(5,\) is not a matrix.*adamw"),
        ({"params": [nn.Parameter(torch.zeros(()))]}, "is not a matrix"),
        ({"params": [("conv", nn.Parameter(torch.zeros(4, 3, 3, 3)))]}, r"'conv' .*layout='conv'"),
        ({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]}, "real floating-point"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "layout": "convolution"}, "unknown layout"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "adam"}, "did you mean 'adamw'"),
        ({"params": [nn.Parameter(torch.zeros(2, 2))], "momentum": 2.0}, "momentum"),
    ],
)
def test_what_is_not_a_matrix_is_refused_at_once(group, message):
    """torch.optim.Muon.add_param_group accepts 1-D parameters and fails at the step."""
    with pytest.raises(ConfigError, match=message):
        Muon([dict(group)])
    first = nn.Parameter(torch.zeros(3, 3))
    optimizer = Muon([("first", first)] if isinstance(group["params"][0], tuple) else [first])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1


def test_a_parameter_listed_twice_is_refused():
    (p,) = parameters((3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="twice"):
            Muon([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": [p]}, {"params": [p]}])


def test_adams_rate_under_a_scale_of_order_one_is_warned_of_once():
    with pytest.warns(UserWarning, match="looks like Adam's") as caught:
        Muon([{"params": [p]} for p in parameters((3, 3), (3, 4))], lr=1e-3, scale="keller")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(parameters((3, 3)), lr=1e-3)
        Muon(parameters((3, 3)), lr=convert_lr(1e-3, 0.1, "moonlight", "keller", 1024).lr, scale="keller")


def test_it_learns():
    """Least squares with a target out of reach: Muon gets there, and the same run twice gives the same bits."""
    X, Y = randn(64, 8), randn(64, 8, seed=1)
    losses = []
    for _ in range(2):
        (w,) = parameters((8, 8))
        optimizer = Muon([w], lr=0.2, weight_decay=0.0)
        for step in range(150):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 150)
            optimizer.zero_grad()
            loss = (X @ w.T - Y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    best = (X @ torch.linalg.lstsq(X, Y).solution - Y).square().mean()
    assert losses[0] == losses[1]
    assert losses[0] < best * 1.01
