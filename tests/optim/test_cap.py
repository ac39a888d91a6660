"""The loss-change cap of post 10657, against its definition written out with an uncapped twin."""

import copy
import math
import pickle

import pytest
import torch
from tests.optim.toy import randn
from torch import nn

from quintic.core import ConfigError
from quintic.optim import Muon, OptimConfig, build_optimizer, diagnose, snapshot


def groups(dtype=torch.float64, rates=(0.1, 0.1)):
    """Matrices, a stack and a split under Muon, a vector and a table under AdamW."""
    shapes = [(6, 8), (3, 6, 8)], [(12, 8)], [(7,), (9, 4)]
    params = [
        [nn.Parameter(randn(*s, seed=10 * i + j, dtype=dtype)) for j, s in enumerate(some)]
        for i, some in enumerate(shapes)
    ]
    return [
        {"params": params[0], "lr": rates[0]},
        {"params": params[1], "lr": rates[0], "split": {"sizes": (8, 4)}, "decay": "spectral"},
        {"params": params[2], "lr": rates[1], "algorithm": "adamw"},
    ]


def pair(cap, *, dtype=torch.float64, rates=(0.1, 0.1), **settings):
    """The same parameters twice, under an optimizer with the cap and under one without."""
    optimizers = Muon(groups(dtype, rates), cap=cap, **settings), Muon(groups(dtype, rates), **settings)
    return [(optimizer, [p for g in optimizer.param_groups for p in g["params"]]) for optimizer in optimizers]


def set_grads(params, seed, scale=1.0):
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=100 * seed + i, dtype=p.dtype) * scale


def slope(before, after, params, lr):
    """u.g of the step before -> after."""
    moved = zip(before, after, params, strict=True)
    return sum(((old.double() - new.double()) * p.grad.double()).sum().item() for old, new, p in moved) / lr


def follow(a, b, x, y):
    """Put twin y of x in the same place, with the same state."""
    for p, q in zip(x, y, strict=True):
        q.data.copy_(p.data)
    b.load_state_dict(copy.deepcopy(a.state_dict()))


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_whole_step_is_scaled_where_it_promises_too_much(dtype, rates, maximize):
    (a, x), (b, y) = pair(0.5, dtype=dtype, rates=rates, maximize=maximize)
    factors = []
    for step in range(4):
        before = [p.detach().clone() for p in x]
        set_grads(x, step + 1, 1.0 if step < 3 else 1e-4)
        set_grads(y, step + 1, 1.0 if step < 3 else 1e-4)
        follow(a, b, x, y)
        a.step()
        b.step()
        promised = slope(before, y, x, max(rates)) * (-1 if maximize else 1)
        factor = min(1.0, 0.5 / promised) if promised > 0 else 1.0
        assert float(a.cap_factor) == pytest.approx(factor, rel=1e-5)
        rounding = 0.0 if dtype != torch.bfloat16 else 2.0**-8
        for old, p, q in zip(before, x, y, strict=True):
            expected = old.double() + factor * (q.detach().double() - old.double())
            torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=1e-6 + rounding)
        factors.append(factor)
    assert min(factors) < 0.5 and factors[-1] == 1.0
    if dtype != torch.bfloat16:
        assert slope(before, x, x, max(rates)) < 0.5
    for (_, q), (_, p) in zip(b.state.items(), a.state.items(), strict=True):  # momentum knows nothing of the cap
        assert all(torch.equal(q[key], p[key]) for key in q)


def test_a_step_that_is_short_enough_or_uphill_is_left_alone_to_the_bit():
    """min(1, T / (u.g)) would turn a step with u.g < 0 round."""
    (a, x), (b, y) = pair(1e6, momentum=0.95, adamw_betas=(0.95, 0.95), weight_decay=0.0)
    for step in range(4):
        before = [p.detach().clone() for p in x]
        for params in (x, y):
            set_grads(params, 1, -0.01 if step == 3 else 1.0)  # against the momentum
        a.cap = b.cap = None
        if step == 3:
            a.cap = 1e-6
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert slope(before, x, x, 0.1) < -1e-3
    assert float(a.cap_factor) == 1.0


def test_no_gradient_no_rate_and_no_finite_gradient():
    (a, x), (b, y) = pair(1e-3)
    set_grads(x, 1)
    set_grads(y, 1)
    x[0].grad = y[0].grad = None
    before = x[0].detach().clone()
    a.step()
    assert torch.equal(x[0], before) and float(a.cap_factor) < 1
    before = [p.detach().clone() for p in x]
    x[1].grad[0, 0, 0] = math.inf
    with pytest.warns(UserWarning, match="not finite"):
        a.step()
    assert all(torch.equal(p, q) for p, q in zip(x, before, strict=True)) and float(a.cap_factor) == 1
    for group in b.param_groups:
        group["lr"] = torch.tensor(0.0)
    b.cap = 1e-3
    before = [p.detach().clone() for p in y]
    b.step()
    assert all(torch.equal(p, q) for p, q in zip(y, before, strict=True))


def test_nothing_is_read_from_the_device():
    """Tensors of the meta device have no values, so reading one raises."""
    params = [nn.Parameter(torch.empty(4, 6, device="meta")), nn.Parameter(torch.empty(5, device="meta"))]
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}], cap=1.0)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert optimizer.cap_factor.device.type == "meta"


def deep_linear(lr, *, cap=None, warmup=0, steps=120):
    """Losses of six linear layers on noise, under AdamW with a rate that falls linearly to 0."""
    layers = [nn.Parameter(randn(32, 32, seed=i, dtype=torch.float32) / 32**0.5) for i in range(6)]
    X, Y = randn(64, 32, seed=10, dtype=torch.float32), randn(64, 32, seed=11, dtype=torch.float32)
    optimizer = Muon([{"params": layers, "algorithm": "adamw"}], lr=lr, weight_decay=0.0, cap=cap)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / (warmup + 1)) * (1 - step / steps)
        optimizer.zero_grad()
        out = X
        for W in layers:
            out = out @ W.T
        loss = (out - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_takes_the_place_of_a_warmup():
    """The claim of post 10657: a run that explodes at the start without a warm-up does not with the cap T = 1."""
    bare, warm, capped = deep_linear(0.1), deep_linear(0.1, warmup=50), deep_linear(0.1, cap=1.0)
    assert max(bare) > 5 * bare[0]
    assert max(warm) < 1.05 * warm[0] and max(capped) < 1.05 * capped[0]
    assert capped[-1] < 1.05 * warm[-1] < 0.5 * warm[0]


def test_a_factor_that_was_read_keeps_its_value():
    p = nn.Parameter(randn(4, 3))
    optimizer = Muon([p], cap=1e-3)
    p.grad = randn(4, 3, seed=1) * 100
    optimizer.step()
    factor = optimizer.cap_factor
    p.grad = randn(4, 3, seed=1) * 1e-6
    optimizer.step()
    assert factor < optimizer.cap_factor == 1


def test_settings_copies_and_diagnosis():
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="cap ="):
            Muon([nn.Parameter(torch.zeros(2, 2))], cap=wrong)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    model.output = nn.Linear(16, 4)
    assert build_optimizer(model, OptimConfig()).cap is None
    optimizer = build_optimizer(model, OptimConfig(cap=0.01, weight_decay=0.0))
    model(randn(32, 8, dtype=torch.float32)).square().mean().backward()
    before = snapshot(optimizer)
    optimizer.step()
    found = diagnose(model, optimizer, before)
    factor = float(optimizer.cap_factor)
    assert 0 < factor < 0.5
    assert found.metrics["cap_factor"] == factor
    assert found.metrics["predicted_change"] == pytest.approx(-0.01 * 0.01, rel=1e-3)  # -lr T
    assert found.metrics["orthogonalized_matrices"] == found.metrics["muon_matrices"] == 2
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.cap == 0.01 and float(again.cap_factor) == factor
