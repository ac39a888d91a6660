"""A mesh of one process takes the path of divided parameters, and its training is that of whole ones.

What several processes add, that parts differ, is tested under torchrun in tests/distributed.
"""

import pytest
import torch
import torch.distributed as dist
from tests.distributed.divided_muon import Model, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintic.optim import GradientClipping, Muon
from quintic.optim.sharded import agree_on_any, holds_whole_matrices, local, own_part, sum_over_parts, whole


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def divided(model, mesh):
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return model


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0, "maximize": True},
        {"momentum_form": "sum"},
        {"decay": "spectral", "decay_rank": 2},
        {"vectors": "sign", "embeddings": "row-l2", "cap": 0.5},
        {"clip": "spectral", "norm": "schatten:4"},
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_divided_parameters_train_like_whole_ones(mesh, options):
    options = dict(options)
    clip = options.pop("clip", "global")
    models = []
    for divide in (False, True):
        torch.manual_seed(0)
        model = Model(torch.float64)
        models.append(divided(model, mesh) if divide else model)
    optimizers = [Muon(model, lr=0.02, **options) for model in models]
    clips = [GradientClipping(clip, 3.0) for _ in models]
    for number in range(3):
        torch.manual_seed(number)
        gradients = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in models[0].named_parameters()}
        if number == 1:
            gradients["wide"][-1, -1] = float("nan")
        for each in zip(models, optimizers, clips, strict=True):
            step(*each, gradients)
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps == 1
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert isinstance(q, DTensor)
        torch.testing.assert_close(local(q.detach()), p.detach(), rtol=1e-10, atol=1e-10, msg=name)


def test_the_parts_of_one_process_are_the_whole(mesh):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    cut = distribute_tensor(x, mesh, [Shard(0)])
    assert torch.equal(whole(local(cut), cut), x) and torch.equal(own_part(x, cut), x)
    assert own_part(x, x) is x and whole(x, x) is x and local(x) is x
    sums = [x.sum(), local(cut).sum()]
    assert float(sum_over_parts(sums, [x, cut])) == pytest.approx(2 * float(x.sum()))
    assert agree_on_any(torch.tensor([True, False]), [x, cut]).tolist() == [True, False]
    stack = torch.randn(4, 3, 2)
    assert not holds_whole_matrices(cut) and holds_whole_matrices(x)
    assert holds_whole_matrices(distribute_tensor(stack, mesh, [Shard(0)]))
    assert not holds_whole_matrices(distribute_tensor(stack, mesh, [Shard(0)]), "conv")  # one matrix, of three axes
    assert not holds_whole_matrices(distribute_tensor(stack, mesh, [Shard(1)]))
