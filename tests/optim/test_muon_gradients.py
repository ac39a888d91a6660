"""Gradients of every kind: absent, late, zero, strided, sparse, not finite; and half precision."""

import copy
import warnings

import pytest
import torch
from tests.optim.toy import Model, parameters, randn, run, set_grads, snapshot
from torch import nn

from quintic.core import ConfigError
from quintic.optim import Muon


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"nesterov": False}, {"momentum_form": "sum"}])
def test_gradients_are_only_read(options):
    """Keller's Muon and pytorch_optimizer overwrite p.grad under Nesterov."""
    model = Model()
    optimizer = Muon(model, **options)
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


def test_steps_left_out_are_warned_of_once():
    (p,) = parameters((3, 4))
    optimizer = Muon([p])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
    assert len(warned) == 1 and optimizer.skipped_steps == 3


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


@pytest.mark.parametrize("scale", ["moonlight", "rms"])
def test_zero_gradients_move_nothing_but_decay(scale):
    for wd in (0.0, 0.1):
        params = parameters((4, 6), (2, 4, 6))
        before = snapshot(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        params[1].grad[1] = 1.0
        Muon(params, lr=0.5, weight_decay=wd, scale=scale).step()
        torch.testing.assert_close(params[0].detach(), before[0] * (1 - 0.5 * wd))
        torch.testing.assert_close(params[1].detach()[0], before[1][0] * (1 - 0.5 * wd))
        assert params[1].isfinite().all()


def test_what_gradients_of_zero_do_to_an_expert_and_to_rows():
    """Unused from the start: nothing, exactly. Used before: the expert moves on, at the same speed, while rows fade."""
    stack, rows = parameters((3, 8, 8), (8, 8))
    optimizer = Muon([stack, rows], lr=0.01, weight_decay=0.0)
    before, speeds, fading = snapshot([stack]), [], []
    for step in range(300):
        stack.grad, rows.grad = randn(3, 8, 8, seed=step), randn(8, 8, seed=1000 + step)
        stack.grad[0] = 0.0
        if step >= 20:
            stack.grad[1] = 0.0
            rows.grad[:4] = 0.0
        last = snapshot([stack, rows])
        optimizer.step()
        speeds.append((stack[1] - last[0][1]).norm().item())
        fading.append((rows[:4] - last[1][:4]).norm().item())
    assert torch.equal(stack[0], before[0][0])
    assert speeds[-1] == pytest.approx(speeds[20], rel=0.1)
    assert fading[-1] < 1e-3 * fading[20]


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


def test_parameters_may_be_views_of_one_buffer():
    """Offset storage, as flat parameters of other libraries have it; neighbours are not touched."""
    flat = torch.cat(
        [torch.full((3,), 7.0), randn(48), torch.full((2,), 7.0), randn(30, seed=1), torch.full((1,), 7.0)]
    )
    shared = [nn.Parameter(flat[3:51].view(8, 6)), nn.Parameter(flat[53:83].view(6, 5).T)]
    apart = [nn.Parameter(p.detach().clone().contiguous()) for p in shared]
    run(shared, Muon(shared, lr=0.1), 2)
    run(apart, Muon(apart, lr=0.1), 2)
    for p, q in zip(shared, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
    assert flat[[0, 1, 2, 51, 52, 83]].eq(7.0).all()
    assert torch.equal(flat[3:51].view(8, 6), shared[0].detach())


@pytest.mark.parametrize("spectrum", ["rank one", "equal", "condition 1e12", "denormal"])
def test_awkward_spectra_give_steps_no_longer_than_promised(spectrum):
    U, _, Vh = torch.linalg.svd(randn(12, 8, dtype=torch.float64), full_matrices=False)
    sigma = {
        "rank one": torch.eye(8, dtype=torch.float64)[0],
        "equal": torch.ones(8, dtype=torch.float64),
        "condition 1e12": torch.logspace(0, -12, 8, dtype=torch.float64),
        "denormal": torch.full((8,), 1e-39, dtype=torch.float64),
    }[spectrum]
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(12, 8, dtype=dtype))
        p.grad = (U @ torch.diag(sigma) @ Vh).to(dtype)
        Muon([p], lr=1.0, scale="none", ns_dtype=torch.float32).step()
        step = -p.detach().double()
        values = torch.linalg.svdvals(step)
        assert values.max() < 1.2
        if spectrum in ("rank one", "equal") and dtype == torch.float32:
            kept = sigma > 0
            assert values[kept].min() > 0.8
            assert values[~kept].numel() == 0 or values[~kept].max() < 1e-3
        assert (step * (U @ Vh)).sum() > 0.7


def test_sparse_gradients_are_named_in_the_error():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 10))
    optimizer = Muon(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"'0\.weight' is sparse.*sparse=False"):
        optimizer.step()


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
        if step == 0:  # rounded once
            assert all(torch.equal(p, q.to(dtype)) for p, q in zip(half.parameters(), full.parameters(), strict=True))
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        assert p.dtype == dtype
        for key, value in a.state[p].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, b.state[q][key], msg=f"{name} {key}")
        # three roundings of weights of order 1
        torch.testing.assert_close(p.float(), q, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float64)])
def test_parameters_of_one_shape_may_differ_in_dtype(dtypes):
    def mixed():
        return [nn.Parameter(randn(4, 6, seed=i).to(d)) for i, d in enumerate(dtypes * 2)]

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
