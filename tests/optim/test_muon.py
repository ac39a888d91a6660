"""Muon's rule against a plain float64 reference, torch.optim.Muon, and the defects of peers."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.optim.toy import parameters, randn, run, set_grads
from torch import nn

from quintic.linalg import msign
from quintic.optim import Muon

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
def test_the_sum_form_is_the_posts_and_gives_the_same_steps(nesterov):
    a, b = (parameters((6, 9), (3, 4, 4), dtype=torch.float64) for _ in range(2))
    average = Muon(a, momentum=0.9, nesterov=nesterov)
    summed = Muon(b, momentum=0.9, nesterov=nesterov, momentum_form="sum")
    totals = [torch.zeros_like(p) for p in b]
    for step in range(5):
        set_grads(a, step + 1)
        set_grads(b, step + 1)
        totals = [0.9 * total + p.grad for total, p in zip(totals, b, strict=True)]
        average.step()
        summed.step()
    for p, q, total in zip(a, b, totals, strict=True):
        torch.testing.assert_close(summed.state[q]["momentum_buffer"], total)
        torch.testing.assert_close(q, p)


def test_a_changed_momentum_tells_the_forms_apart():
    """Directions by hand in float64: (mu B + G) of the sum, mu B + (1 - mu) G of the average."""
    g = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    mu = (0.5, 0.9)
    averages = (1 - mu[0]) * g[0], mu[1] * (1 - mu[0]) * g[0] + (1 - mu[1]) * g[1]
    sums = g[0], mu[1] * g[0] + g[1]
    ahead = {"average": mu[1] * averages[1] + (1 - mu[1]) * g[1], "sum": mu[1] * sums[1] + g[1]}
    assert not torch.allclose(msign(ahead["average"]), msign(ahead["sum"]), atol=0.1)
    for form, direction in ahead.items():
        p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, scale="none", momentum_form=form)
        for gradient, momentum in zip(g, mu, strict=True):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = gradient
            before = p.detach().clone()
            optimizer.step()
        torch.testing.assert_close(before - p.detach(), msign(direction))


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
