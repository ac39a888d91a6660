"""Two processes that share a batch end with the bias and the auxiliary gradient of one that has all of it."""

import gc
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quintic.core.initial import initialize_
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
    balance_step(layers)
    return [layer.router.bias for layer in layers], [layer.router.weight.grad for layer in layers]


def accumulated(layer, parts):
    """Load of micro-batches, in a loop that knows of nothing: DistributedDataParallel with its own settings."""
    for part in parts:
        layer(part).sum().backward()
    return balance_step(layer)[0].load


def worker(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layers, x = make()
    biases, gradients = step(layers, x[rank * 20 : rank * 20 + 20])
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= 2
    torch.save((biases, gradients, wrapped_loads(x[rank * 20 :][:20])), f"{path}/{rank}.pt")
    gc.collect()  # what still holds the group when it is destroyed may bring the process down as it ends
    dist.barrier()
    dist.destroy_process_group()


def wrapped_loads(part):
    wrapped = torch.nn.parallel.DistributedDataParallel(make()[0][0])
    wrapped.module.balance = LossFree()
    return accumulated(wrapped, part.split((3, 17)))


def test_two_processes_are_one_batch(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    expected = step(*make())
    layers, x = make()
    layers[0].balance = LossFree()
    loads = accumulated(layers[0], [x])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found[0], expected[0], strict=True):
            assert torch.equal(a, b) and a.any()
        for a, b in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(a, b)
        assert found[2] == loads
