"""The usual router in one step, against the same by parts in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels
from torch.utils.flop_counter import FlopCounterMode

from quintic.moe import router as router_module
from quintic.moe.router import Router

pytestmark = needs_kernels


def made(n, d, e, k, scale=1.0, seed=0):
    """A router with a bias, tokens, and gradients of gates, logits and scores."""
    g = torch.Generator().manual_seed(seed)
    router = Router(d, e, k, scale=scale, normalize_gates=k > 1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(e, d, generator=g) / d**0.5)
        router.bias.copy_(torch.randn(e, generator=g) / 10)
    x = torch.randn(n, d, generator=g)
    return router, x, [torch.randn(n, size, generator=g) for size in (k, e, e)]


def passes(router, x, given_, dtype=torch.float32, keep=None, mask=None):
    """What it finds, and the gradients of x and weight."""
    weight = router.weight.detach().to(dtype).requires_grad_()
    x = x.detach().to(dtype).requires_grad_()
    found = torch.func.functional_call(router, {"weight": weight}, (x,), {"keep": keep, "mask_n": mask})
    outputs = [found.gates_nk, found.logits_ne, found.scores_ne]
    used = [(out, g.to(dtype)) for out, g in zip(outputs, given_, strict=True) if g is not None]
    return found, torch.autograd.grad([out for out, _ in used], [x, weight], [g for _, g in used], allow_unused=True)


def close(a, b, tolerance=2e-6):
    return bool((a - b).norm() <= tolerance * b.norm() + 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(17, 300), st.integers(1, 70), st.integers(2, 70), st.floats(0.1, 5.0), st.data())
def test_values_and_gradients_are_those_of_float64(n, d, e, scale, data):
    k = data.draw(st.integers(2, e))
    router, x, gradients = made(n, d, e, k, scale, seed=n)
    used = data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
    gradients = [g if on else None for g, on in zip(gradients, used, strict=True)]
    (found, grads), taken = passes(router, x, gradients), []
    expected, exact = passes(router, x, gradients, torch.float64, keep=lambda ids: taken.append(ids) or found.ids_nk)
    for name in ("gates_nk", "logits_ne", "scores_ne"):
        assert close(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.biased_ne, found.scores_ne.detach() + router.bias)
    assert torch.equal(found.ids_nk, router_module.argtop(found.biased_ne, k))
    assert torch.equal(found.counts_e, torch.bincount(found.ids_nk.flatten(), minlength=e))
    assert all(close(a, b, 5e-6) for a, b in zip(grads, exact, strict=True))
    assert not found.biased_ne.requires_grad and not found.ids_nk.requires_grad
    # Rounding alone may choose otherwise.
    differ = (taken[0] != found.ids_nk).any(1)
    gap = expected.biased_ne.sort(1, descending=True).values.diff(dim=1).abs()[:, :k].min(1).values
    assert not (differ & (gap > 1e-5)).any()


def test_tokens_that_are_masked_out_are_routed_but_not_counted():
    router, x, gradients = made(50, 12, 6, 2)
    mask = torch.arange(50) % 3 > 0
    found, grads = passes(router, x, gradients, mask=mask)
    all_, expected = passes(router, x, gradients)
    assert torch.equal(found.ids_nk, all_.ids_nk) and torch.equal(found.gates_nk, all_.gates_nk)
    assert torch.equal(found.counts_e, torch.bincount(found.ids_nk[mask].flatten(), minlength=6))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    strided = torch.stack([mask, mask], 1)[:, 0]
    assert torch.equal(passes(router, x, gradients, mask=strided)[0].counts_e, found.counts_e)


def test_a_decision_that_is_replaced_has_its_own_gates():
    router, x, gradients = made(50, 12, 6, 2, scale=2.5)
    other = torch.arange(50)[:, None] % 5 + torch.arange(2)
    (found, grads), (expected, exact) = (
        passes(router, x, gradients, dtype, keep=lambda ids: other) for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(found.ids_nk, other) and close(found.gates_nk, expected.gates_nk)
    torch.testing.assert_close(found.gates_nk.sum(1), torch.full((50,), 2.5))
    assert torch.equal(found.counts_e, torch.bincount(other.flatten(), minlength=6))
    assert all(close(a, b) for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize("size", [(40, 8, 5, 2), (900, 33, 20, 3)])
def test_the_number_of_threads_changes_no_bit(size):
    given_, threads, found = made(*size), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out, grads = passes(*given_)
            found.append([*(t.detach() for t in out), *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("trained", ["x", "weight", "neither"])
def test_gradients_that_nobody_asks_for(trained):
    router, x, _ = made(30, 8, 5, 2)
    x.requires_grad_(trained == "x"), router.weight.requires_grad_(trained == "weight")
    gates = router(x).gates_nk
    assert gates.requires_grad == (trained != "neither")
    if trained != "neither":
        gates[:, 0].sum().backward()
        assert (x.grad is None) == (trained != "x") and (router.weight.grad is None) == (trained != "weight")


def test_a_nan_stays_in_its_row():
    router, x, _ = made(30, 8, 5, 2)
    x[7, 3] = torch.nan
    found, others = router(x), torch.arange(30) != 7
    assert found.gates_nk[7].isnan().all() and found.gates_nk[others].isfinite().all()


def test_unused_gates_cost_nothing_and_crash_nothing():
    router, x, _ = made(30, 8, 5, 2)
    router(x.requires_grad_()).logits_ne.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x @ router.weight.t() @ router.weight).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True), ({"score": "softmax"}, False), ({"select": "softmax"}, False), ({"normalize_gates": False}, False),
        ({"num_groups": 2, "top_groups": 1}, False), ({"num_groups": 2, "top_groups": 2}, True),
        ({"offset": True}, False),
    ],
)  # fmt: skip
def test_what_it_takes(options, fits, monkeypatch):
    calls, original = [], router_module.fused_route
    monkeypatch.setattr(router_module, "fused_route", lambda *a: calls.append(a) or original(*a))
    router = Router(8, 6, 2, scale=1.0, **options)
    for p in router.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(20, 8)
    router(x)
    assert len(calls) == fits
    router(x[:16]), router(x.bfloat16()), router(x, shift=lambda scores: scores * 0)
    assert len(calls) == fits


def test_flops_are_counted_as_by_parts(monkeypatch):
    router, x, _ = made(30, 8, 5, 2)
    counted = []
    for fits in (True, False):
        monkeypatch.setattr(router_module, "fits_fused_route", lambda *a, fits=fits: fits)
        for leaf in (x, x.clone().requires_grad_()):
            with FlopCounterMode(display=False) as counter:
                router(leaf).gates_nk.sum().backward()
            counted.append(counter.get_total_flops())
    assert counted[:2] == counted[2:] == [2 * 2 * 30 * 8 * 5, 3 * 2 * 30 * 8 * 5]


def test_operators_are_declared_as_they_are():
    router, x, (dgates, dlogits, dscores) = made(30, 8, 5, 2)
    own, checks, weight = torch.ops.quintic, ("test_schema", "test_faketensor"), router.weight.detach()
    torch.library.opcheck(own.route, (x, weight, router.bias, 2), test_utils=checks)
    _, scores, _, ids = own.route(x, weight, router.bias, 2)
    gates, total = scores.gather(1, ids), scores.sum(1)
    for given_, mask in (((dgates, dlogits, dscores), [True, True]), ((dgates, None, None), [False, True])):
        arguments = (*given_, x, weight, scores, ids, gates, total, 1.0, mask)
        torch.library.opcheck(own.route_backward, arguments, test_utils=checks)
