"""Blocks computed again in the backward pass: the same loss, gradients and loads, and less memory."""

from dataclasses import replace

import pytest
import torch
from tests.kernels import needs_kernels

from quintic.lm import LanguageModel, LMConfig, generate
from quintic.lm.memory import saved_numbers_per_token
from quintic.moe import balance_step

CONFIG = LMConfig(vocab_size=64, context=32, num_layers=3, num_experts=8, top_k=2)


def models(**changes):
    config = replace(CONFIG, **changes)
    return [LanguageModel(replace(config, checkpoint=checkpoint), seed=0).train() for checkpoint in (False, True)]


@pytest.mark.parametrize("changes", [{}, {"dense": True}, {"normalize_experts": "rms"}, {"q_rank": 16}])
def test_gradients_and_loads_are_the_same(changes):
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for model in models(**changes):
        for half in ids.chunk(2):  # two micro-batches, as the loop does
            model(half[:, :-1], targets=half[:, 1:]).backward()
        loads = [stats.load for stats in balance_step(model)]
        found.append(({name: p.grad.clone() for name, p in model.named_parameters()}, loads))
    (plain, loads), (again, loads_again) = found
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name
    assert loads == loads_again


def kept_bytes(model, ids):
    """Bytes that autograd holds after the forward pass, parameters aside."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids[:, :-1], targets=ids[:, 1:])
    assert loss.requires_grad
    return sum(kept.values())


def test_less_is_kept():
    ids = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
    plain, checkpointed = (kept_bytes(model, ids) for model in models(num_layers=6))
    assert checkpointed < plain / 3
    config = replace(CONFIG, num_layers=6)
    assert saved_numbers_per_token(replace(config, checkpoint=True)) < saved_numbers_per_token(config) / 3


def kept_per_token(config, *, fused=False):
    ids = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr("quintic.core.kernels._found", lambda: (None, "declined"))
        return kept_bytes(LanguageModel(config, seed=0).train(), ids) / 4 / 256


def test_the_estimate_counts_what_each_part_keeps():
    plain, estimate = kept_per_token(CONFIG), saved_numbers_per_token(CONFIG)
    assert estimate == pytest.approx(plain, rel=0.05)
    for changes in ({"q_rank": 64}, {"kv_rank": 128}, {"num_shared": 3}, {"num_heads": 6}):
        more = replace(CONFIG, **changes)
        assert saved_numbers_per_token(more) - estimate == pytest.approx(kept_per_token(more) - plain, rel=0.05)


@needs_kernels
@pytest.mark.parametrize("changes", [{}, {"num_heads": 6}, {"d_ff": 512}, {"num_shared": 3}])
def test_kernels_keep_no_more_than_the_estimate(changes):
    config = replace(CONFIG, **changes)
    assert kept_per_token(config, fused=True) < 1.05 * saved_numbers_per_token(config)


@needs_kernels
def test_fused_attention_keeps_what_the_projections_made():
    more = kept_per_token(replace(CONFIG, num_heads=6), fused=True) - kept_per_token(CONFIG, fused=True)
    # Queries, keys and values, mixed values, one logarithm.
    assert more == CONFIG.num_layers * 4 * (32 + (16 + 32) + 32 + 1)


@pytest.mark.parametrize("larger", [{"d_ff": 1024}, {"d_expert": 256}])
def test_with_checkpoints_the_estimate_is_of_inputs_and_the_largest_block(larger):
    config = replace(CONFIG, **larger)
    blocks = [kept_per_token(replace(config, num_layers=1, num_dense_layers=dense)) for dense in (0, 1)]
    inputs = config.num_layers * config.d_model
    assert saved_numbers_per_token(replace(config, checkpoint=True)) - inputs == pytest.approx(max(blocks), rel=0.12)


def test_generation_does_not_mind():
    plain, checkpointed = models()
    texts = [list(generate(model, [1, 2, 3], max_tokens=10, temperature=0.0)) for model in (plain, checkpointed)]
    assert texts[0] == texts[1]
