"""The model: causality, documents, cache, presets, initial weights, counts."""

import math
from dataclasses import fields, replace

import pytest
import torch

from quintic.assets import preset_names
from quintic.core import ConfigError, DataError
from quintic.core.roles import Role, declared_roles
from quintic.lm import LanguageModel, LMConfig
from quintic.moe import AuxLoss, Combination, LossFree, ZLoss

TINY = LMConfig()


def ids(b=2, t=24, seed=0):
    return torch.randint(0, TINY.vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return LanguageModel(TINY, seed=0).double().eval()


def test_the_future_does_not_reach_the_past(model):
    a, b = ids(), ids()
    b[:, 15:] = ids(seed=1)[:, 15:]
    torch.testing.assert_close(model(a)[:, :15], model(b)[:, :15])
    assert not torch.allclose(model(a)[:, 15:], model(b)[:, 15:])


def test_documents_do_not_see_each_other(model):
    text = ids(b=1)
    documents = torch.tensor([[0] * 10 + [1] * 14])
    apart = model(text, documents=documents)
    # Rotations depend on distances only, so a document alone gives the same logits as one further along.
    torch.testing.assert_close(apart[:, 10:], model(text[:, 10:]))
    torch.testing.assert_close(apart[:, :10], model(text[:, :10]))
    assert not torch.allclose(apart[:, 10:], model(text)[:, 10:])


@pytest.mark.parametrize("cuts", [[24], [1] * 24, [10, 14], [7, 1, 16]])
def test_cached_equals_uncached(model, cuts):
    text, cache, pieces = ids(), model.new_cache(2), []
    for piece in text.split(cuts, dim=1):
        pieces.append(model(piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text))


def test_batch_rows_are_independent(model):
    text = ids(b=5)
    torch.testing.assert_close(model(text)[3:4], model(text[3:4]))


def test_a_cast_by_to_keeps_the_rotations(model):
    cast = LanguageModel(TINY, seed=0).to(torch.float64)
    assert torch.equal(cast.eval()(ids()), model(ids()))
    half = LanguageModel(TINY, seed=0).to(torch.bfloat16)
    assert torch.equal(half.rotation, model.rotation) and half(ids()).dtype == torch.bfloat16


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(DataError, match="65 tokens is longer than the model's context of 64"):
        model(ids(t=65))


def test_starts_at_the_loss_of_a_uniform_guess():
    text = ids(b=16, t=64)
    logits = LanguageModel(TINY, seed=0)(text)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten())
    assert loss.item() == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


def test_initial_weights_are_a_pure_function_of_seed_and_name():
    a, b, c = LanguageModel(TINY, seed=0), LanguageModel(TINY, seed=0), LanguageModel(TINY, seed=1)
    deeper = LanguageModel(replace(TINY, num_layers=5), seed=0).state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
        if tensor.std() > 0:
            assert not torch.equal(tensor, c.state_dict()[name])
    assert torch.equal(a.state_dict()["head.weight"], deeper["head.weight"])


def test_initial_weights_keep_the_residual_stream_of_order_one():
    """Each of the 2 L branches adds 1 / (2 L) of the variance: outputs are scaled down, inputs have unit gain."""
    config = LMConfig(num_layers=4, num_shared=2)
    model = LanguageModel(config, seed=0)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.1 * config.d_model**-0.5, rel=0.05)
    blocks = model.blocks
    for block in blocks:
        attention, ffn = block.attention, block.ffn
        outputs = [attention.out.weight] + (
            [ffn.experts.down, ffn.shared.down] if block is not blocks[0] else [ffn.down]
        )
        for weight in outputs:
            assert weight.std().item() == pytest.approx((8 * weight.shape[-1]) ** -0.5, rel=0.05)
        inputs = [attention.q.weight, attention.kv_down.weight, attention.kv_up.weight]
        for weight in inputs + ([ffn.router.weight, ffn.experts.gate_up] if block is not blocks[0] else [ffn.gate_up]):
            assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.07)
    dense = LanguageModel(replace(config, dense=True), seed=0).blocks[1].ffn.down
    assert dense.std().item() == pytest.approx((8 * dense.shape[1]) ** -0.5, rel=0.05)


def test_every_parameter_declares_its_role():
    model = LanguageModel(replace(TINY, q_rank=16), seed=0)
    roles = declared_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    kinds = {name: role.role for name, role in roles.items()}
    assert kinds["embedding.weight"] is Role.EMBEDDING and kinds["head.weight"] is Role.HEAD
    assert kinds["blocks.1.ffn.experts.gate_up"] is Role.EXPERT_STACK and roles[
        "blocks.1.ffn.experts.gate_up"
    ].split == {"blocks": 2}
    assert kinds["blocks.1.ffn.router.weight"] is Role.ROUTER
    assert kinds["blocks.0.attention.kv_norm.gain"] is Role.VECTOR
    assert kinds["blocks.0.attention.q_down.weight"] is Role.MATRIX


def test_counts():
    model = LanguageModel(TINY, seed=0)
    total, active = model.num_parameters()
    assert total == sum(p.numel() for p in model.parameters())
    # Two MoE blocks, 6 of 8 experts idle, three matrices of 32 x 64 each.
    assert total - active == 2 * 6 * 3 * 32 * 64


def test_flops_against_the_profiler():
    """6 per active parameter is exact for the matrices; the profiler sees all of them but attention's mask."""
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(TINY, num_dense_layers=3)
    model, text = LanguageModel(config, seed=0), ids(b=2, t=64)
    with FlopCounterMode(display=False) as counter:
        model(text).sum().backward()
    attention = 3.0 * config.num_layers * config.num_heads * 64 * (32 + 32) * 2 * 64
    matrices = model.flops_per_token(64) * 2 * 64 - attention
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert matrices == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("size", preset_names("lm"))
def test_presets_have_widths_of_eight(size):
    config = LMConfig.preset(size)
    for name in ("d_model", "qk_nope_dim", "qk_rope_dim", "v_dim", "kv_rank", "d_ff", "d_expert"):
        assert getattr(config, name) % 8 == 0, name
    with torch.device("meta"):
        model = LanguageModel(config, initialize=False)
    assert model.num_parameters()[1] < model.num_parameters()[0]


def test_the_defaults_are_the_tiny_preset():
    assert LMConfig.preset("tiny") == LMConfig()
    with pytest.raises(ConfigError, match="laptop"):
        LMConfig.preset("laptob")


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", 0), ("qk_rope_dim", 15), ("qk_nope_dim", 15), ("kv_rank", 15), ("top_k", 1), ("top_k", 9),
     ("num_dense_layers", 4), ("balance", "sign"), ("balance_rule", "sing"), ("route_scale", -1.0),
     ("rope_theta", 0.0), ("rope_theta", math.inf), ("balance_rate", math.inf), ("aux_over", "layer")],
)  # fmt: skip
def test_bad_values_name_their_field(field, value):
    with pytest.raises(ConfigError, match=r"lm\.aux" if field == "aux_over" else f"lm.{field}"):
        LMConfig(**{"aux_weight": 0.1, field: value})


@pytest.mark.parametrize("field", [field.name for field in fields(LMConfig) if type(field.default) in (int, float)])
def test_no_size_or_rate_is_negative(field):
    with pytest.raises(ConfigError, match=rf"lm\.{field}"):
        LMConfig(**{field: type(getattr(LMConfig(), field))(-1)})


def test_sizes_of_experts_do_not_matter_without_experts():
    assert LMConfig(dense=True, num_experts=1, top_k=4).has_experts is False
    assert LMConfig(num_dense_layers=3, num_experts=1, top_k=4).has_experts is False
    assert LMConfig(num_dense_layers=2).has_experts is True


def test_balancers_are_those_of_the_fields():
    make = lambda **fields: LMConfig(**fields).make_balance()  # noqa: E731
    assert make() == LossFree("floored-rms")
    assert make(balance_rule="sign", balance_rate=0.01, balance_rest=0.1) == LossFree("sign", 0.01, rest=0.1)
    assert make(balance="none") == Combination(())
    assert make(balance="none", aux_weight=0.1, aux_over="global") == AuxLoss(0.1, over="global")
    assert make(aux_weight=0.1, z_weight=0.2) == LossFree() + AuxLoss(0.1) + ZLoss(0.2)


def test_a_printed_model_tells_the_size_of_every_layer():
    for module in LanguageModel(LMConfig(q_rank=8), initialize=False).modules():
        if list(module.parameters(recurse=False)):
            assert module.extra_repr(), module
    assert "(q): Linear(64 -> 64)" in repr(LanguageModel(LMConfig(), initialize=False))
