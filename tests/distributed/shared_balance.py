"""Run by test_shared_balance.py on two ranks: a batch shared out against one process that has all of it."""

import torch
import torch.distributed as dist

from quintic.core.initial import initialize_
from quintic.engine.mesh import join_ranks
from quintic.moe import AuxLoss, LossFree, MoE, aux_loss, balance_step


def make():
    layers = torch.nn.ModuleList(
        MoE(16, 8, num_experts=8, top_k=2, balance=LossFree(rule, 0.1) + AuxLoss(1.0, over="global"))
        for rule in ("floored-rms", "quantile")
    )
    initialize_(layers, 0)
    return layers, torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


def step(layers, x):
    for layer in layers:
        layer(x)
    aux_loss(layers).backward()
    assert [stats.tokens for stats in balance_step(layers)] == [40, 40]  # a token of all processes counts once
    return [layer.router.bias for layer in layers], [layer.router.weight.grad for layer in layers]


def first_layer():
    layer = make()[0][0]
    layer.balance = LossFree()
    return layer


def accumulated(layer, parts):
    """Load of micro-batches, in a loop that knows of nothing: DistributedDataParallel with its own settings."""
    for part in parts:
        layer(part).sum().backward()
    return balance_step(layer)[0].load


def alone():
    """What one process finds that has the whole batch."""
    layers, x = make()
    biases, gradients = step(layers, x)
    return biases, gradients, accumulated(first_layer(), [x])


def main():
    biases, gradients, load = alone()  # before there is a group that would add counts up
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks.world == 2
        layers, x = make()
        part = x[ranks.rank * 20 :][:20]
        found_biases, found_gradients = step(layers, part)
        for found, expected in zip(found_biases, biases, strict=True):
            assert torch.equal(found, expected) and found.any()
        for found, expected in zip(found_gradients, gradients, strict=True):
            dist.all_reduce(found)
            torch.testing.assert_close(found / 2, expected)
            assert found.any()
        assert accumulated(torch.nn.parallel.DistributedDataParallel(first_layer()), part.split((3, 17))) == load
        if ranks.is_main:
            print("all agree")


if __name__ == "__main__":
    main()
