"""Experts lie where their weights do, whatever the default device, and ask no device for what it has not."""

import pytest
import torch
from tests.devices import NARROW, meta_by_default, without_float64
from torch import nn

from quintic.moe import AuxLoss, LossFree, MoE, aux_loss, balance_step, geometry, split_dense
from quintic.moe.splitting import _fit
from quintic.moe.stats import RouteRecorder, sampling_floor


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def stepped(balance):
    """A layer's bias after a step, its loss, and what was recorded."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        layer = MoE(8, 4, num_experts=4, top_k=2, balance=balance)
        plain = MoE(8, 4, num_experts=4, top_k=2)
    x = randn(2, 6, 8)
    with RouteRecorder(layer) as recorder:
        loss = layer(x).square().mean() + aux_loss(layer) + aux_loss(plain)
    loss.backward()
    balance_step(layer)
    assert layer.router.weight.grad is not None
    return layer.router.bias, loss.detach(), recorder.counts[0], layer.router.weight.grad


@pytest.mark.parametrize(
    "balance", [LossFree() + AuxLoss(1e-2), LossFree("quantile"), LossFree(target=(0.1, 0.2, 0.3, 0.4))]
)
def test_a_step_is_the_same_with_another_default_device(balance):
    here = stepped(balance)
    with meta_by_default():
        there = stepped(balance)
        assert sampling_floor(64, 8, 2) > 0
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


def feed_forward():
    with torch.device("cpu"):
        ffn = nn.Sequential(nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Linear(20, 6, bias=False))
        for i, p in enumerate(ffn.parameters()):
            p.data = randn(*p.shape, seed=i)
    return ffn


@pytest.mark.parametrize("experts", [4, 20])  # all subsets, and a search
def test_a_network_is_split_the_same_with_another_default_device(experts):
    here = split_dense(feed_forward(), experts, randn(50, 6))
    with meta_by_default():
        there = split_dense(feed_forward(), experts, randn(50, 6))
        assert torch.equal(there.to_moe(2)(randn(3, 6)), here.to_moe(2)(randn(3, 6)))
    assert here.errors == there.errors


@pytest.mark.parametrize("vectors", [4, 20])
def test_errors_of_vectors_on_another_device_are_there(vectors):
    gram = geometry.gram_matrices(torch.empty(3, vectors, 5, device="meta"))
    found = [geometry.random_errors(gram), geometry.orthogonal_errors(gram)]
    assert {each.device.type for each in found} == {"meta"}


def test_no_float64_is_asked_of_a_device_that_has_none(monkeypatch):
    reached = []
    with without_float64(monkeypatch):
        x = torch.ones(10, 6, device=NARROW)
        reached.append(geometry.gram_matrices(x.view(10, 2, 3)).dtype)
        _fit(x, torch.ones(10, 4, device=NARROW))
    assert reached == [torch.float64]
