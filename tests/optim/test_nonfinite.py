"""Gradients that are NaN or infinite, under every policy: no momentum is ever poisoned."""

import copy
import pickle

import pytest
import torch

from quintic.core import ConfigError
from quintic.optim import Muon, NonFiniteGradientError
from quintic.optim.nonfinite import NONFINITE


def made(policy, bad=None):
    """An optimizer of two matrices, a stack and a vector, two steps in; the third has a bad gradient."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 4), "b": (6, 4), "stack": (3, 4, 4), "vector": (5,)}
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()}
    groups = [
        {"params": [(n, named[n]) for n in ("a", "b", "stack")]},
        {"params": [("vector", named["vector"])], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=0.1, nonfinite=policy)
    for step in range(3):
        for name, p in named.items():
            p.grad = torch.randn(p.shape, generator=g)
            if step == 2 and name in (bad or {}):
                p.grad.view(-1)[1] = bad[name]
        if step < 2:
            optimizer.step()
    return named, optimizer


def moments(optimizer, p):
    return {name: value.clone() for name, value in optimizer.state[p].items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["b", "stack", "vector"])
@pytest.mark.parametrize("policy", NONFINITE)
def test_every_policy(policy, where, value):
    named, optimizer = made(policy, {where: value})
    sound, reference = made(policy)
    before = {name: p.detach().clone() for name, p in named.items()}
    states = {name: moments(optimizer, p) for name, p in named.items()}
    reference.step()
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match=rf"the gradient of '{where}' is not finite; nothing was"):
            optimizer.step()
    elif policy == "skip":
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step()
        assert optimizer.skipped_steps == 1
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 0
    for name, p in named.items():
        touched = policy in ("skip-parameter", "propagate") and name != where
        if touched:
            torch.testing.assert_close(p, sound[name])
        elif policy == "propagate":
            assert p.isnan().all()
        else:
            assert torch.equal(p, before[name])
        if not touched:
            for key, old in states[name].items():
                assert torch.equal(optimizer.state[p][key], old)


@pytest.mark.parametrize("policy", NONFINITE)
def test_finite_gradients_and_none_at_all_are_the_same_under_every_policy(policy):
    named, optimizer = made(policy)
    sound, reference = made("skip")
    for o in (optimizer, reference):
        o.step()
        o.zero_grad()
        o.step()
    assert all(torch.equal(p, sound[name]) for name, p in named.items())


@pytest.mark.parametrize("policy", NONFINITE)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float32, torch.float32)])
def test_a_finite_gradient_whose_square_overflows_takes_its_step(policy, dtypes):
    p, q = (torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype)) for dtype in dtypes)
    optimizer = Muon([p, q], lr=0.1, weight_decay=0.0, nonfinite=policy)
    p.grad, q.grad = 1e30 * torch.eye(4, dtype=p.dtype), torch.eye(4, dtype=q.dtype)
    assert torch.linalg.vector_norm(p.grad).isinf()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    torch.testing.assert_close(p.double(), q.double(), atol=1e-4, rtol=0)
    assert p.trace() < -0.1


def test_the_policy_survives_copies_and_a_wrong_one_is_refused():
    _, optimizer = made("raise")
    assert copy.deepcopy(optimizer).nonfinite == pickle.loads(pickle.dumps(optimizer)).nonfinite == "raise"
    with pytest.raises(ConfigError, match=r"unknown nonfinite 'rais'; did you mean 'raise'\?"):
        Muon([torch.zeros(2, 2, requires_grad=True)], nonfinite="rais")
