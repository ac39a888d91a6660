"""Run by test_several_meshes.py on four ranks: layouts of other programs than ours, against one process.

Tensor parallelism with and without FSDP, as torch's own functions lay it out, and experts on a mesh of their own.
"""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from quintic.core import ConfigError
from quintic.optim import GradientClipping, Muon, NonFiniteGradientError, global_norm
from quintic.optim.nonfinite import NONFINITE
from quintic.optim.sharded import settled

WIDTH = 8


class Model(nn.Module):
    """A gain, two matrices that tensor parallelism cuts, a kernel that only FSDP does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 6, 3, padding=1)

    def forward(self, x):
        y = self.down(torch.relu(self.up(self.norm(x))))
        return self.conv(y.mT)


def parallel(model, mesh, sequence):
    """Tensor parallelism, of which the form with sequences leaves gradients of the gain as pending sums."""
    if not sequence:
        return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    def own(_, args):
        return (args[0].chunk(mesh.size(), 1)[mesh.get_local_rank()],)

    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}
    model = parallelize_module(model, mesh, plan)
    model.norm.register_forward_pre_hook(own, prepend=True)
    return model


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal_weights(model, alone, what):
    for (name, p), q in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(
            full(p.detach()), q[1].detach(), rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def check_torch_parallel(lay_out, kind="global", **options):
    """Real steps of a model that torch's functions have laid out; ``kind`` of clipping, or none."""
    torch.manual_seed(0)
    alone = Model().double()
    model = lay_out(copy.deepcopy(alone))
    models = (alone, model)
    optimizers = [Muon(each, lr=0.02, **options) for each in models]
    clips = [GradientClipping(kind, 0.5) if kind else (lambda _: None) for _ in models]
    for number in range(4):
        x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
        results = []
        for each, optimizer, clip in zip(models, optimizers, clips, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            if number == 2:  # in the last row of one matrix, which one or two processes have
                bad = torch.zeros(16, WIDTH, dtype=torch.float64)
                bad[-1] = float("nan")
                grad = each.up.weight.grad
                if isinstance(grad, DTensor):
                    bad = distribute_tensor(bad, grad.device_mesh, grad.placements)
                grad.add_(bad)
            if lay_out.__name__ == "sequences" and each is model:
                assert each.norm.weight.grad.placements == (Partial(),)
            results.append(clip(each))
            optimizer.step()
        if kind:
            torch.testing.assert_close(
                results[1].norm, results[0].norm, rtol=1e-12, atol=0, equal_nan=True, msg=lambda m: f"{lay_out}, {m}"
            )
        assert_equal_weights(model, alone, (lay_out, kind, options, number))
    assert [each.skipped_steps for each in optimizers] == [1, 1]
    if options.get("cap"):
        torch.testing.assert_close(optimizers[1].cap_factor, optimizers[0].cap_factor)


def check_meshes(meshes, order, bad=None, nonfinite="skip", **options):
    """Given gradients, laid out in every way there is; names of ``order`` are placed in this order."""
    grid, flat = meshes
    ways = {
        "both": (grid, [Shard(0), Shard(1)]),
        "first": (grid, [Shard(0), Replicate()]),
        "second": (grid, [Replicate(), Shard(1)]),
        "twice": (grid, [Shard(0), Shard(0)]),  # uneven, twice
        "pending": (grid, [Shard(0), Partial()]),
        "all": (flat, [Shard(0)]),
        "rows": (grid["dp"], [Shard(0)]),
        "experts": (grid["ep"], [Shard(0)]),
        "copied": (grid["ep"], [Replicate()]),
        "plain": (None, None),
    }  # fmt: skip
    torch.manual_seed(1)
    shape = {name: (4, 6, 3) if name == "experts" else (7, 6) for name in ways}
    weights = {name: torch.randn(shape[name], dtype=torch.float64) for name in ways}
    gradients = {name: torch.randn(shape[name], dtype=torch.float64) for name in ways}
    if bad:
        gradients[bad].flatten()[0] = float("nan")  # with rank 0, and not with rank 3 but by agreement

    def placed(tensor, name, gradient):
        mesh, placements = ways[name]
        if mesh is None:
            return tensor.clone()
        if name != "pending":
            return distribute_tensor(tensor, mesh, placements)
        rows = distribute_tensor(tensor, mesh, [Shard(0), Replicate()])
        if not gradient:
            return rows
        share = 0.25 if mesh.get_local_rank(1) == 0 else 0.75
        return DTensor.from_local(rows.to_local() * share, mesh, placements, shape=tensor.shape, stride=tensor.stride())

    alone = [nn.Parameter(weights[name].clone()) for name in order]
    params = [nn.Parameter(placed(weights[name], name, False)) for name in order]
    truth = torch.cat([gradients[name].flatten() for name in order]).norm()
    for name, p, q in zip(order, params, alone, strict=True):
        p.grad, q.grad = placed(gradients[name], name, True), gradients[name].clone()
        if name == "pending":  # of which a norm knows without a parameter, too
            torch.testing.assert_close(global_norm([p.grad]), gradients[name].norm(), equal_nan=True)
    if bad:
        with pytest.raises(NonFiniteGradientError, match=f"is not finite: parameter {order.index(bad)};"):
            GradientClipping("global", nonfinite="raise")(params)
    steps = []
    for each in (params, alone):
        result = GradientClipping("global", 0.5)(each)
        torch.testing.assert_close(result.norm, truth, rtol=1e-12, atol=0, equal_nan=True)
        optimizer = Muon([{"params": list(zip(order, each, strict=True))}], lr=0.02, nonfinite=nonfinite, **options)
        try:
            optimizer.step()
            steps.append(optimizer.skipped_steps)
        except NonFiniteGradientError as error:
            steps.append(str(error))
    assert steps[0] == steps[1], steps
    for name, p, q in zip(order, params, alone, strict=True):
        torch.testing.assert_close(
            full(p.detach()), q.detach(), rtol=1e-9, atol=1e-9, equal_nan=True,
            msg=lambda m, n=name: f"{order}, bad {bad}, {nonfinite}, {n}: {m}",
        )  # fmt: skip


def check_refusals(grid):
    pair = DeviceMesh("cpu", [0, 1])
    weights = distribute_tensor(torch.ones(4, 4), grid, [Shard(0), Replicate()])
    if dist.get_rank() < 2:
        other = distribute_tensor(torch.ones(4, 4), pair, [Shard(0)])
        with pytest.raises(ConfigError, match=r"different processes.*ranks \[0, 1, 2, 3\].*ranks \[0, 1\]"):
            global_norm([weights, other])
    else:
        other = DTensor.from_local(torch.empty(0), pair, [Shard(0)], run_check=False)
        with pytest.raises(ConfigError, match=r"parameter 0 lies on a mesh of other processes"):
            Muon([nn.Parameter(other)])
    pending = DTensor.from_local(torch.ones(4, 4), grid["dp"], [Partial()])
    with pytest.raises(ConfigError, match=r"'w' is a sum whose terms lie on several processes"):
        Muon([("w", nn.Parameter(pending))])
    assert torch.equal(settled(pending).to_local(), torch.full((4, 4), 2.0)) and settled(weights) is weights


def main():
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # that it gathers axis after axis
    dist.init_process_group("gloo")
    grid, flat = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")), init_device_mesh("cpu", (4,))

    def tensors(model):
        return parallel(model, grid["ep"], False)

    def sequences(model):
        return parallel(model, grid["ep"], True)

    def sharded(model):
        return fully_shard(model, mesh=grid["dp"], reshard_after_forward=True)

    def both(model):
        return fully_shard(parallel(model, grid["ep"], False), mesh=grid["dp"])

    for options in ({}, {"distributed": "gather"}, {"decay": "spectral", "cap": 0.05}, {"kind": "spectral"}):
        check_torch_parallel(both, **options)
    for lay_out in (tensors, sequences, sharded):
        check_torch_parallel(lay_out)
    for kind in (None, "spectral"):
        check_torch_parallel(sequences, kind)

    everything = ["both", "first", "second", "twice", "pending", "all", "rows", "experts", "copied", "plain"]
    for order in (
        ["both", "first"],
        ["first", "both"],
        ["all", "experts"],
        ["rows", "experts"],
        everything,
        everything[::-1],
    ):
        check_meshes((grid, flat), order)
    check_meshes((grid, flat), everything, cap=0.05, distributed="gather")
    for policy in NONFINITE:
        for bad in ("all", "experts", "rows", "pending") if policy == "skip" else ("both",):
            check_meshes((grid, flat), everything, bad, policy)
    check_meshes((grid, flat), ["experts", "all"], "all")
    check_refusals(grid)
    if dist.get_rank() == 0:
        print("all agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
