import numpy as np
import pytest
import torch

from quintic.cli.wiring import build_settings, build_task


@pytest.mark.parametrize("task", ["ddpm", "tarflow"])
def test_what_is_kept_of_an_image_for_the_backward_pass(task):
    """Against the storages that autograd holds of a batch of a model with its weights, and without a trace."""
    made, _, _ = build_task(task, [], build_settings(task, "tiny", ["data.drawn=60"]))
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


def test_a_flow_that_computes_its_blocks_again_keeps_less():
    def kept(*changes):
        return build_task("tarflow", [], build_settings("tarflow", "laptop", ["data.drawn=60", *changes]))[0]

    plain, again = (kept(*c).saved_numbers_per_image() for c in ((), ("tarflow.checkpoint=true",)))
    assert plain / 4 < again < plain / 2  # of four blocks
