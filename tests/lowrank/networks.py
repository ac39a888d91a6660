"""Small networks with weights of a seed."""

from itertools import pairwise

from tests.lowrank.matrices import randn
from torch import nn


def filled(module, seed=0):
    module = module.double()
    for number, p in enumerate(module.parameters()):
        p.data = randn(*p.shape, seed=seed + number) / p.shape[-1] ** 0.5
    return module


def mlp(*widths, bias=True, seed=0):
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.ReLU()]
    return filled(nn.Sequential(*layers[:-1]), seed)
