"""Parameters, gradients and a model of every role, made from seeds."""

import torch
from torch import nn

from quintic.core.roles import Constant, Normal, Role, declare


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(*shapes, seed=0, dtype=torch.float32):
    return [nn.Parameter(randn(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def with_grads(*grads):
    """Parameters of zeros with these gradients."""
    params = []
    for g in grads:
        p = nn.Parameter(torch.zeros_like(g))
        p.grad = g
        params.append(p)
    return params


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
