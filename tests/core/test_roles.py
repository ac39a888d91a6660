"""Roles stay with the module through copies, casts, meta construction and parameter replacement."""

import copy

import torch
from torch import nn

from quintic.core.roles import Constant, Normal, ParameterRole, Role, declare, declared_roles


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3))
        self.gain = nn.Parameter(torch.empty(3))
        self.extra = nn.Parameter(torch.empty(1))
        declare(self, "gain", Role.VECTOR, Constant(1.0))
        declare(self, "weight", Role.MATRIX, Normal(0.02))


EXPECTED = {
    "0.weight": ParameterRole(Role.MATRIX, Normal(0.02)),
    "0.gain": ParameterRole(Role.VECTOR, Constant(1.0)),
}


def test_roles_in_parameter_order_and_undeclared_left_out():
    assert list(declared_roles(nn.Sequential(Leaf())).items()) == list(EXPECTED.items())


def test_roles_survive():
    model = nn.Sequential(Leaf())
    assert declared_roles(copy.deepcopy(model).to(torch.float64)) == EXPECTED
    with torch.device("meta"):
        assert declared_roles(nn.Sequential(Leaf())) == EXPECTED
    model[0].weight = nn.Parameter(torch.zeros(1, 3))
    assert declared_roles(model) == EXPECTED
