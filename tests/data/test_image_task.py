import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quintic.cli.plan import _plan_of_images
from quintic.cli.wiring import build_settings, build_task
from quintic.core.loss import Loss
from quintic.data import image_task


def built(task, *changes, size="tiny"):
    return build_task(task, [], build_settings(task, size, ["data.drawn=60", *changes]))[:2]


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, as long as each lives."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, size):
        self.now -= size


@pytest.mark.parametrize("task", ["ddpm", "tarflow"])
def test_what_is_kept_of_an_image_for_the_backward_pass(task):
    """Against the storages that autograd holds of a batch of a model with its weights, and without a trace."""
    made, _ = built(task)
    model, kept = made.build(0), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.loss(model, made.batch(np.arange(16)))
    before = torch.get_rng_state()
    assert made.saved_numbers_per_image() == pytest.approx(sum(kept.values()) / 4 / 16, rel=0.05)
    assert loss.total.requires_grad and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "task,changes", [("ddpm", ()), ("tarflow", ()), ("tarflow", ("tarflow.checkpoint=true", "tarflow.blocks=6"))]
)
def test_tensors_take_little_more_than_that_at_the_peak_of_a_step(task, changes):
    """Against all that are made by a step; what passes between two operations comes on top."""
    made, _ = built(task, *changes)
    model = made.build(0)
    batch = made.batch(np.arange(128) % 60)  # enough that what is made once for all images does not count
    made.loss(model, batch).total.backward()  # gradients are there already
    with Living() as living:
        made.loss(model, batch).total.backward()
    assert 1.0 < living.most / (128 * 4 * made.saved_numbers_per_image()) < 1.25


def test_a_flow_that_computes_its_blocks_again_keeps_less():
    plain, again = (
        built("tarflow", *c, size="laptop")[0].saved_numbers_per_image() for c in ((), ("tarflow.checkpoint=true",))
    )
    assert plain / 4 < again < plain / 2  # of four blocks


def test_a_process_on_a_cpu_has_gaps_in_its_memory_and_a_device_has_none():
    """Factors measured of whole processes, see the constants."""

    def activations(device, *changes):
        made, settings = built("tarflow", "engine.batch_size=32", *changes)
        bytes_of_all = _plan_of_images(made, settings, 1, 4, device).bytes_per_rank["activations"]
        return bytes_of_all / (32 * 4), made.saved_numbers_per_image()

    (gpu, kept), (cpu, _) = activations("cuda"), activations("cpu")
    assert gpu == pytest.approx(kept) and cpu == pytest.approx(1.4 * kept)
    again = "tarflow.checkpoint=true"
    (gpu, little), (cpu, _) = activations("cuda", again), activations("cpu", again)
    assert gpu == pytest.approx(little) and cpu == pytest.approx(0.9 * kept) and cpu > 1.4 * little


def test_validation_takes_images_from_all_of_its_split_and_leaves_the_model_in_its_mode(monkeypatch):
    monkeypatch.setattr(image_task, "_VALIDATION_IMAGES", 4)
    monkeypatch.setattr(image_task, "_EVAL_BATCH", 3)
    made, _ = built("tarflow", "data.validation_fraction=0.2")  # of 60
    split, seen = made.data.validation, []
    assert len(split) == 12

    def loss(model, batch, noise, first):
        seen.append(batch["images"])
        assert not model.training
        return Loss(torch.ones(()), 1)

    monkeypatch.setattr(made, "evaluation_loss", loss)
    for training in (False, True):
        model = made.build(0).train(training)
        assert made.evaluate(model, "validation") == {"val_loss": 1.0}
        assert model.training == training
    assert [len(part) for part in seen] == [3, 1] * 2
    assert torch.equal(torch.cat(seen[:2]), made.pixels(split.images[[0, 3, 6, 9]]))
