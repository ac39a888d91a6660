"""With a process group of one, counts are added over it and stay what they were."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from quintic.moe import LossFree, MoE, balance_step


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def balanced(layers, x):
    for layer in layers:
        layer(x)
    return balance_step(nn.ModuleList(layers)), [layer.router.bias.clone() for layer in layers]


def test_counts_are_added_in_the_group_that_is_asked_for(group, monkeypatch):
    other, asked = dist.new_group([0]), []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: asked.append(group))
    for chosen in (None, other):
        balance_step(MoE(d_model=8, d_expert=4, num_experts=4, top_k=2), chosen)
    assert asked == [None, other]


def test_one_process_sums_to_itself(request):
    torch.manual_seed(0)
    layers = [MoE(d_model=8, d_expert=4, num_experts=e, top_k=2, balance=LossFree()) for e in (4, 6)]
    x, alike = torch.randn(2, 5, 8), copy.deepcopy(layers)
    alone, biases = balanced(layers, x)
    request.getfixturevalue("group")
    together, same_biases = balanced(alike, x)
    assert len(alone) == len(together) == 2
    for a, b in zip(biases, same_biases, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)
    for one, two in zip(alone, together, strict=True):
        assert str(one) == str(two)
