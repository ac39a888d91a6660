"""Run by test_divided_muon.py on several ranks: the optimizer on divided parameters against the same on whole ones."""

import sys

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.core.roles import Normal, Role, declare
from quintic.engine.mesh import join_ranks
from quintic.engine.shard import divide_
from quintic.optim import GradientClipping, Muon
from quintic.optim.sharded import local, own_part, whole


class Model(nn.Module):
    """Every kind of parameter: uneven rows, fused matrices, stacks of few and many experts, vectors, a table."""

    def __init__(self, dtype):
        super().__init__()
        shapes = {
            "odd": (5, 7), "wide": (3, 16), "fused": (12, 8), "columns": (6, 8), "stack": (8, 6, 4), "few": (1, 6, 4),
            "table": (11, 4), "gain": (7,), "one": (1,),
        }  # fmt: skip
        kinds = {
            "stack": Role.EXPERT_STACK, "few": Role.EXPERT_STACK, "table": Role.EMBEDDING, "gain": Role.VECTOR,
            "one": Role.VECTOR,
        }  # fmt: skip
        splits = {"fused": {"sizes": (6, 3, 3)}, "columns": {"axis": "columns", "blocks": 2}}
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


class Counted(TorchDispatchMode):
    """Bytes that gathers bring to this process."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "all_gather" in str(func):
            self.bytes += out.numel() * out.element_size()
        return out


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

        # Only matrices travel, once each; stacks divided by expert stay.
        torch.manual_seed(0)
        model = Model(torch.float32)
        divide_(model, ranks)
        optimizer, clip = Muon(model, lr=0.02), GradientClipping("none")
        gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
        step(model, optimizer, clip, gradients)
        with Counted() as counted:
            step(model, optimizer, clip, gradients)
        if int(sys.argv[1]) > 1:
            moved = ("odd", "wide", "fused", "columns", "few")
            most = sum(4 * (p.numel() + 4 * p[0].numel()) for name, p in model.named_parameters() if name in moved)
            assert 0 < counted.bytes <= most, (counted.bytes, most)  # rows are padded to equal shards
        if ranks.is_main:
            print("all agree", counted.bytes)


if __name__ == "__main__":
    main()
