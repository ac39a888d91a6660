"""Run by test_divided_muon.py on several ranks: the optimizer on divided parameters against the same on whole ones."""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.core.roles import Normal, Role, declare
from quintic.engine.checkpoint import TrainState, load_model, load_training
from quintic.engine.mesh import join_ranks
from quintic.engine.saving import take_snapshot, write_checkpoint
from quintic.engine.shard import divide_
from quintic.optim import GradientClipping, Muon, muon
from quintic.optim.sharded import local, own_part, whole


class Model(nn.Module):
    """Every kind of parameter: uneven rows, fused matrices, stacks of few and many experts, vectors, a table."""

    def __init__(self, dtype):
        super().__init__()
        shapes = {
            "odd": (5, 7), "wide": (3, 16), "fused": (12, 8), "columns": (6, 8), "stack": (5, 6, 4), "few": (1, 6, 4),
            "table": (11, 4), "gain": (7,), "one": (1,),
        }  # fmt: skip
        kinds = {
            "stack": Role.EXPERT_STACK, "few": Role.EXPERT_STACK, "table": Role.EMBEDDING, "gain": Role.VECTOR,
            "one": Role.VECTOR,
        }  # fmt: skip
        splits = {"fused": {"sizes": (6, 3, 3)}, "columns": {"axis": "columns", "blocks": 2}, "stack": {"blocks": 2}}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)))
            declare(self, name, kinds.get(name, Role.MATRIX), Normal(1.0), split=splits.get(name))


def step(model, optimizer, clip, gradients):
    for name, p in model.named_parameters():
        g = gradients[name].to(p.dtype).contiguous()
        if isinstance(p, DTensor):
            part = own_part(g, p).clone()
            g = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        p.grad = g.clone()
    result = clip(model)
    optimizer.step()
    return float(result.norm)


def check(ranks, dtype, tolerance, **options):
    kind = options.pop("clip", "global")
    models, optimizers, clips = [], [], []
    for divide in (False, True):
        torch.manual_seed(0)
        model = Model(dtype)
        if divide:
            divide_(model, ranks)
        models.append(model)
        optimizers.append(Muon(model, lr=0.02, **options))
        clips.append(GradientClipping(kind, 3.0))
    for number in range(4):
        gradients = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in models[0].named_parameters()}
        if number == 2:
            gradients["wide"][-1, -1] = float("nan")  # on the last rank only
        norms = [step(*each, gradients) for each in zip(models, optimizers, clips, strict=True)]
        assert norms[0] == norms[1] or abs(norms[0] - norms[1]) < tolerance * norms[0] or norms[0] != norms[0], norms
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps == 1
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            whole(local(q), q), p.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    if options.get("cap"):
        assert abs(float(optimizers[0].cap_factor) - float(optimizers[1].cap_factor)) < 1e-9


def check_owners(ranks, dtype, tolerance, **options):
    """Owners and gathering take the same steps."""
    models = []
    for distributed in ("gather", "owner"):
        torch.manual_seed(0)
        model = Model(dtype)
        divide_(model, ranks)
        optimizer = Muon(model, lr=0.02, distributed=distributed, **options)
        for _ in range(3):
            gradients = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
            step(model, optimizer, GradientClipping("none"), gradients)
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            local(q), local(p), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_reload(ranks, **options):
    """What divided ranks have saved goes on, divided or whole, as if it had not been saved."""

    def made(divide):
        torch.manual_seed(0)
        model = Model(torch.float64)
        if divide:
            divide_(model, ranks)
        return model, Muon(model, lr=0.02, **options), GradientClipping("none")

    first = made(divide=True)
    gradients = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in first[0].named_parameters()}
    for _ in range(2):
        step(*first, gradients)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.gather(own)[0])
        saved = write_checkpoint(folder, take_snapshot(*first[:2], TrainState(step=2), ranks=ranks), ranks)
        others = [made(divide=True), made(divide=False)]
        for model, optimizer, _ in others:
            load_model(saved, model)
            load_training(saved, model, optimizer)
        ranks.wait()
    for each in (first, *others):
        step(*each, gradients)
    for (name, p), q, r in zip(first[0].named_parameters(), *(each[0].parameters() for each in others), strict=True):
        assert torch.equal(local(p), local(q)), name
        torch.testing.assert_close(whole(local(p), p), r, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class Counted(TorchDispatchMode):
    """Bytes of matrices that come to this process from others, by collective."""

    def __init__(self, shards):
        super().__init__()
        self.shards, self.bytes = shards, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if "all_gather" in name and isinstance(out, torch.Tensor):
            self.add("gather", out.numel() * out.element_size() * (self.shards - 1) // self.shards)
        elif "alltoall_base" in name:
            received, _, _, sizes = args[:4]
            others = sum(sizes) - sizes[dist.get_rank() % self.shards]
            self.add("all-to-all", others * received.element_size())
        return out

    def add(self, kind, number):
        self.bytes[kind] = self.bytes.get(kind, 0) + number


class Equal(nn.Module):
    """Eight equal matrices, so that nothing is padded and the owners' shares are even."""

    def __init__(self):
        super().__init__()
        for i in range(8):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(16, 16)))
            declare(self, f"w{i}", Role.MATRIX, Normal(1.0))


def count(model, ranks, shards, distributed):
    """Bytes received by this process in one step of Muon."""
    divide_(model, ranks)
    optimizer = Muon(model, lr=0.02, distributed=distributed)
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    with Counted(shards) as counted:
        step(model, optimizer, GradientClipping("none"), gradients)
    return counted.bytes


def main():
    torch.set_num_threads(1)
    with join_ranks(torch.device("cpu"), int(sys.argv[1])) as ranks:
        f64 = torch.float64
        check(ranks, f64, 1e-10)
        check(ranks, f64, 1e-10, nesterov=False, scale="rms", weight_decay=0.0)
        check(ranks, f64, 1e-9, decay="spectral", decay_rank=2)
        check(ranks, f64, 1e-10, vectors="sign", embeddings="row-l2", cap=0.5)
        check(ranks, f64, 1e-10, norm="schatten:4", clip="spectral")
        check(ranks, torch.float32, 1e-5)
        check(ranks, torch.bfloat16, 2e-2)
        with mock.patch.object(muon, "_may_look", return_value=False):  # as on accelerators, where nothing is read
            check(ranks, f64, 1e-10)
            check(ranks, torch.bfloat16, 2e-2)

        check_reload(ranks)
        check_reload(ranks, decay="spectral", decay_rank=2)
        check_owners(ranks, f64, 1e-10)
        check_owners(ranks, f64, 1e-10, decay="spectral")
        check_owners(ranks, torch.bfloat16, 2e-2)
        check(ranks, f64, 1e-10, distributed="gather")

        # Only matrices travel, once each; stacks divided by expert stay.
        shards = int(sys.argv[1])
        gathered = count(Model(torch.float32), ranks, shards, "gather")
        owned = count(Model(torch.float32), ranks, shards, "owner")
        if shards > 1 and ranks.mesh is not None:
            moved = [
                p
                for name, p in Model(torch.float32).named_parameters()
                if name in ("odd", "wide", "fused", "columns", "few")
            ]
            assert set(gathered) == {"gather"} and set(owned) == {"all-to-all"}, (gathered, owned)
            most = sum(4 * (p.numel() + shards * p[0].numel()) for p in moved)  # rows are padded to equal shards
            assert 0 < gathered["gather"] <= most, (gathered, most)
            sum_of_all = torch.tensor(owned["all-to-all"])
            dist.all_reduce(sum_of_all, group=ranks.mesh["shard"].get_group())
            assert sum_of_all <= 2 * 4 * sum(p.numel() for p in moved)  # there and back, uneven parts unpadded

            # AdamW reduces gradients and gathers weights, (S-1)/S of all bytes each.
            adamw = 2 * 4 * 8 * 256 * (shards - 1) / shards
            ratios = {how: 1 + sum(count(Equal(), ranks, shards, how).values()) / adamw for how in ("gather", "owner")}
            assert ratios == {"gather": 1.5, "owner": 1 + 1 / shards}, ratios
        if ranks.is_main:
            print("all agree", gathered, owned)


if __name__ == "__main__":
    main()
