"""torch.compile of the step: the same numbers, and nothing is compiled again when the rate changes."""

import pytest
import torch
import torch._dynamo
from tests.optim.toy import randn
from torch import nn

from quintic.optim import Muon

SPECTRAL = {"decay": "spectral", "weight_decay": 0.5}


class CountingBackend:
    """Runs every graph as it is, and counts how many were compiled."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module.forward


def of_every_kind():
    """Groups of matrices, fused ones and vectors."""
    return [
        {"params": [nn.Parameter(randn(8, 6, seed=0))]},
        {"params": [nn.Parameter(randn(12, 6, seed=2))], "split": {"sizes": (8, 4)}},
        {"params": [nn.Parameter(randn(5, seed=3))], "algorithm": "adamw"},
        {"params": [nn.Parameter(randn(5, seed=4))], "algorithm": "adamw"},
    ]


def of_two_equal_shapes():
    return [{"params": [nn.Parameter(randn(8, 6, seed=i)) for i in range(2)]}]


def train(compiled, make, options, steps=4):
    """(parameters, graphs compiled up to each step); rates are set and gradients made anew before each."""
    torch._dynamo.reset()
    options = {**options, "coefficients": "keller", "ns_steps": 1}  # less to trace
    groups = make()
    rate = torch.tensor(0.01)
    optimizer = Muon(groups, lr=rate, **options)
    backend = CountingBackend()
    step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
    graphs = []
    params = [p for group in groups for p in group["params"]]
    for t in range(steps):
        rate.fill_(0.01 * (t + 1))
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * t + i)
        step()
        graphs.append(backend.graphs)
    return params, graphs


@pytest.mark.parametrize(("make", "options"), [(of_every_kind, {"cap": 0.5}), (of_two_equal_shapes, SPECTRAL)])
def test_a_tensor_rate_and_new_gradients_do_not_compile_again(make, options):
    """torch issues 107076 and 163093: a rate that is a Python float is a constant of the compiled code.

    And the gradient of a parameter that was met first as a key of the state is known by its identity.
    """
    plain, _ = train(False, make, options)
    compiled, graphs = train(True, make, options)
    assert graphs[0] > 0
    assert graphs[3] == graphs[2]  # the second and third compile for a state that exists by then
    for p, q in zip(plain, compiled, strict=True):  # each with its own state, also where shapes are equal
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_a_step_of_matrices_is_one_graph_on_cpus_too():
    """Where it fell apart, inductor was left with pieces of symbolic shape and named a size that it did not have."""
    torch._dynamo.reset()
    shapes = ((8, 6), (8, 24), (24, 8), (5, 1), (3, 8, 6))
    plain, compiled = ([nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2))
    backend = CountingBackend()
    by_hand, optimizer = Muon(plain), Muon(compiled)
    step = torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for t in range(4):
        for i, (p, q) in enumerate(zip(plain, compiled, strict=True)):
            p.grad = q.grad = randn(*p.shape, seed=100 * t + i)
        if t == 2:
            plain[1].grad = compiled[1].grad = torch.full(shapes[1], torch.inf)
            with pytest.warns(UserWarning, match="not finite") as warned:
                by_hand.step()
            assert warned[0].filename == __file__  # the user's line
        else:
            by_hand.step()
        step()
    assert backend.graphs == 2  # without a state, and with it
    assert optimizer.skipped_steps == by_hand.skipped_steps == 1
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
