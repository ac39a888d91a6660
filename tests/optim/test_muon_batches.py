"""Matrices of one shape go through one product: the same numbers, in any order, in bounded memory."""

import pytest
import torch
from tests.optim.toy import parameters, randn, run, set_grads, snapshot

import quintic.optim.matrices as matrices_module
from quintic.linalg.polar import msign_
from quintic.optim import Muon

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
        return msign_(stack, **keywords)

    monkeypatch.setattr(matrices_module, "msign_", spy)
    params = parameters(*SHAPES)
    set_grads(params, 1)
    Muon(params).step()
    assert sorted(calls) == sorted([(5, 8, 6), (3, 6, 6), (1, 6, 8), (1, 5, 20), (1, 1, 7), (1, 7, 1)])


def test_extra_memory_is_capped(monkeypatch):
    """No stack exceeds the cap unless a single matrix does; slices of a large expert stack are taken in turns."""
    sizes = []

    def spy(stack, **keywords):
        sizes.append(len(stack))
        return msign_(stack, **keywords)

    monkeypatch.setattr(matrices_module, "msign_", spy)
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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", (0.1, 0.2)),
        ("lr", (torch.tensor(0.1), torch.tensor(0.2))),
        ("weight_decay", (0.1, 0.9)),
        ("momentum", (0.9, 0.5)),
        ("momentum_form", ("average", "sum")),
        ("nesterov", (True, False)),
        ("scale", ("moonlight", "keller")),
        ("ns_steps", (5, 9)),
        ("coefficients", ("quintic", "su")),
        ("method", ("newton-schulz", "svd")),
        ("ns_dtype", (torch.float32, torch.bfloat16)),
        ("maximize", (False, True)),
        ("decay", ("frobenius", "spectral")),
        ("decay_rank", (1, 2)),
        ("norm", ("schatten:inf", "schatten:2")),
    ],
)
def test_matrices_of_one_shape_keep_the_settings_of_their_groups(name, values):
    common = {"lr": 0.1, "weight_decay": 0.5, "decay": "spectral"} if name == "decay_rank" else {"lr": 0.1}
    together, apart = parameters((6, 4), (6, 4)), parameters((6, 4), (6, 4))
    one = Muon(
        [{"params": [p], name: value} for p, value in zip(together, _plain(name, values), strict=True)], **common
    )
    two = [Muon([p], **{**common, name: value}) for p, value in zip(apart, values, strict=True)]
    for step in range(2):
        set_grads(together, step)
        set_grads(apart, step)
        for optimizer in (one, *two):
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def _plain(name, values):
    """In groups dtypes are plain data."""
    return [str(value).removeprefix("torch.") for value in values] if name == "ns_dtype" else values


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (3, 1, 6)])
@pytest.mark.parametrize("method", ["newton-schulz", "gram"])
def test_rows_and_columns_are_exactly_normalised_by_every_method(shape, method):
    (p,) = parameters(shape)
    p.grad, before = randn(*shape, seed=5), p.detach().clone()
    Muon([p], lr=0.1, weight_decay=0.0, scale="none", method=method).step()
    torch.testing.assert_close(before - p.detach(), 0.1 * p.grad / p.grad.norm(dim=(-2, -1), keepdim=True))
