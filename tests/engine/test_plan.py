"""The plan against published sizes, closed forms, and what a forward pass really keeps."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.engine.plan import as_rows, make_plan
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.memory import saved_numbers_per_token


def plan_of(config, **changes):
    with torch.device("meta"):
        model = LanguageModel(config, initialize=False)
    given = {
        "ranks": 1, "shards": 1, "examples_per_step": 64, "micro_batch": 1, "tokens_per_example": config.context,
        "flops_per_token": model.flops_per_token(config.context), "active": model.num_parameters()[1],
        "activation_numbers_per_token": saved_numbers_per_token(config), "logits": 128 * config.vocab_size,
        "compute_bytes": 2,
    }  # fmt: skip
    return make_plan(model, **{**given, **changes})


def test_moonlight_has_its_published_size():
    plan = plan_of(LMConfig.preset("moonlight-16b-a3b"))
    assert plan.parameters["total without embedding and head"] == pytest.approx(15.29e9, rel=1e-3)
    assert plan.parameters["active without embedding and head"] == pytest.approx(2.24e9, rel=2e-3)


def test_memory_is_shown_in_a_unit_of_its_size():
    for name, unit, size in (("tiny", "MiB", 2**20), ("moonlight-16b-a3b", "GiB", 2**30)):
        plan = plan_of(LMConfig.preset(name))
        assert dict(as_rows(plan))[f"weights, {unit} a rank"] == f"{plan.bytes_per_rank['weights'] / size:,.2f}"
        assert f"{plan.total_bytes / size:,.1f} {unit} do not fit in 1.0 {unit}" in " ".join(plan.advice(size))


def test_bytes_and_communication_follow_their_formulas():
    config = LMConfig.preset("small")
    one, many = plan_of(config), plan_of(config, ranks=8, shards=4, examples_per_step=128, micro_batch=4)
    total = one.parameters["total"]
    assert one.bytes_per_rank["weights"] == 4 * total and set(one.sent_per_step.values()) == {0}
    assert many.bytes_per_rank["weights"] == total == many.bytes_per_rank["gradients"]
    model = LanguageModel(config, initialize=False)
    adam = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 1 or "embedding" in name or "head" in name
    )
    assert many.bytes_per_rank["optimizer"] == total - adam + 2 * adam
    # 128 examples over 8 ranks by 4 at a time: 4 micro-batches; 3/4 of everything comes from elsewhere.
    blocks = sum(p.numel() for p in model.blocks.parameters())  # the rest is gathered once for both passes
    assert many.sent_per_step["weights"] == pytest.approx(0.75 * (total + blocks) * 4 * 4)
    assert many.sent_per_step["gradients"] == pytest.approx(0.75 * total * 4 * 4 + 2 * 0.5 * total / 4 * 4)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert many.sent_per_step["muon"] == pytest.approx(2 * 0.75 / 4 * 4 * (total - adam - experts), abs=1)
    kept = plan_of(config, ranks=8, shards=4, examples_per_step=128, micro_batch=4, reshard=False)
    assert kept.sent_per_step["weights"] == pytest.approx(0.75 * total * 4 * 4)
    for reshard in (True, False):  # a small model is gathered whole, and once
        small = plan_of(LMConfig.preset("laptop"), ranks=2, shards=2, reshard=reshard)
        each = 4 * small.parameters["total"]
        assert small.sent_per_step["weights"] == pytest.approx(0.5 * each * 32)
        assert small.bytes_per_rank["gathered weights"] == 2 * each
    assert kept.bytes_per_rank["gathered weights"] >= 4 * total
    adamw = plan_of(config, ranks=8, shards=4, optimizer="adamw")
    assert adamw.sent_per_step["muon"] == 0 and adamw.bytes_per_rank["optimizer"] == 2 * total
    assert 0 < plan_of(config, ranks=8, shards=8).muon_overhead <= 0.25


def test_hours():
    plan = plan_of(LMConfig.preset("small"), ranks=2, shards=2)
    assert plan.hours(1e9, 1e12, 0.5) == pytest.approx(1e9 * plan.flops_per_token / (2 * 1e12 * 0.5) / 3600)


def test_advice_helps():
    config = LMConfig.preset("moonlight-16b-a3b")
    tight = plan_of(config, ranks=8, shards=8)
    words = " ".join(tight.advice(16 * 2**30))
    assert "do not fit in 16.0 GiB" in words and "shard over" in words
    shards = int(words.split("shard over ")[1].split()[0])
    wide = plan_of(config, ranks=shards, shards=shards, examples_per_step=shards)
    assert 2 * (wide.bytes_per_rank["weights"] * 2 + wide.bytes_per_rank["optimizer"]) <= 16.01 * 2**30
    assert plan_of(LMConfig()).advice(2**30) == []
    words = " ".join(tight.advice(80 * 2**30))
    assert "lm.checkpoint=true" in words
    again = plan_of(replace(config, checkpoint=True), ranks=64, shards=64, checkpoint=True)
    assert again.total_bytes < 0.5 * plan_of(config, ranks=64, shards=64).total_bytes and not again.advice(80 * 2**30)
    assert "micro_batch_size" in " ".join(plan_of(LMConfig(), micro_batch=64).advice(2**20))


@pytest.mark.parametrize(
    ("ranks", "shards", "examples", "words"), [(6, 4, 48, "divisor of 6"), (6, 6, 16, "such as 18")]
)
def test_what_does_not_divide_is_refused(ranks, shards, examples, words):
    with pytest.raises(ConfigError, match=words):
        plan_of(LMConfig(), ranks=ranks, shards=shards, examples_per_step=examples)


LAPTOP = LMConfig.preset("laptop")


@pytest.mark.parametrize(
    "config",
    [
        LMConfig(),
        LAPTOP,
        replace(LAPTOP, num_dense_layers=4),
        replace(LAPTOP, v_dim=16, kv_rank=128, top_k=6, q_rank=32),
    ],
    ids=["tiny", "laptop", "dense", "padded"],
)
def test_what_is_kept_for_the_backward_pass(config):
    """Counted from the shapes against the storages that autograd really holds, parameters left out."""
    config = replace(config, context=32)
    model = LanguageModel(config, seed=0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.randint(0, config.vocab_size, (8, config.context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    measured = sum(kept.values()) / 4 / ids.numel() - config.vocab_size
    assert loss.requires_grad and saved_numbers_per_token(config) == pytest.approx(measured, rel=0.25)


def test_weights_in_bfloat16_are_kept_for_the_backward_pass():
    """All but the table, which is looked up, and the router, which stays in float32."""
    model = LanguageModel(LAPTOP, seed=0)
    numbers = {p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    kept = {}

    def pack(t):
        if t.dtype == torch.bfloat16 and t.numel() in numbers and t.untyped_storage().nbytes() == 2 * t.numel():
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no other takes its place
        return t

    ids = torch.randint(0, LAPTOP.vocab_size, (1, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, targets=ids)
    assert loss.requires_grad
    plan = plan_of(LAPTOP)
    assert plan.bytes_per_rank["weights in bfloat16"] == pytest.approx(sum(t.nbytes for t in kept.values()), rel=0.25)
    again = plan_of(replace(LAPTOP, checkpoint=True), checkpoint=True)
    assert again.bytes_per_rank["weights in bfloat16"] < 0.5 * plan.bytes_per_rank["weights in bfloat16"]
    assert plan_of(LAPTOP, compute_bytes=4).bytes_per_rank["weights in bfloat16"] == 0
