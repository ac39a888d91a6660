"""What layers that compute their weight, fused matrices and frozen parameters are taken for."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from quintic.core import Role
from quintic.optim import Muon, roles


def kinds(model):
    return {row.name: (row.role.value, row.algorithm) for row in roles(model)}


def test_a_normalised_weight_is_a_direction_and_gains():
    matrix, gains = ("matrix", "muon"), ("vector", "adamw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = weight_norm(nn.Linear(8, 6))
    model = nn.Sequential(
        old, parametrizations.weight_norm(nn.Linear(6, 6)), parametrizations.orthogonal(nn.Linear(6, 4)),
        nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), parametrizations.spectral_norm(nn.Conv1d(4, 4, 1)),
        parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3),
    )  # fmt: skip
    found = kinds(model)
    assert found["0.weight_v"] == found["1.parametrizations.weight.original1"] == matrix
    assert found["2.parametrizations.weight.original"] == found["5.parametrizations.weight.original"] == matrix
    assert found["0.weight_g"] == found["1.parametrizations.weight.original0"] == gains
    assert found["6.parametrizations.weight.original0"] == gains
    assert found["6.parametrizations.weight.original1"] == matrix
    assert [row.name for row in roles(model).ambiguous] == ["9.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Muon(model, lr=0.01)
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()


def test_a_parametrized_output_layer_is_known_by_its_name():
    model = nn.Module()
    model.body, model.head = nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 9))
    found = kinds(model)
    assert found["head.parametrizations.weight.original1"] == ("head", "adamw")
    alone = roles(parametrizations.weight_norm(nn.Linear(4, 9)))
    assert [row.name for row in alone.ambiguous] == ["parametrizations.weight.original1"]


@pytest.mark.parametrize(
    ("name", "rows", "matrices"),
    [
        ("qkv", 18, 3), ("c_attn", 18, 3), ("to_qkv", 18, 3), ("Wqkv", 18, 3),
        ("qkv_proj", 12, 1),  # fewer keys than queries: where they end is not known
        ("query_key_value", 18, 1),  # head by head in GPT-NeoX
    ],
)  # fmt: skip
def test_queries_keys_and_values_are_three_matrices(name, rows, matrices):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(6, rows, bias=False))
    model.add_module("head", nn.Linear(rows, 2, bias=False))
    (part,) = roles(model)[f"{name}.weight"].parts
    assert (part.matrices, part.n * part.matrices) == (matrices, rows)


def test_the_last_projection_of_an_attention_is_not_the_output():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert [row.name for row in roles(model).ambiguous] == ["0.weight"]
    alone = nn.MultiheadAttention(8, 2)
    assert not roles(alone, strict=True).ambiguous and kinds(alone)["out_proj.weight"] == ("matrix", "muon")


def test_fused_matrices_of_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    table = roles(transformers.GPT2LMHeadModel(config))
    assert table["transformer.h.0.attn.c_attn.weight"].parts[0][:3] == (3, 16, 16)
    assert table["transformer.h.0.attn.c_proj.weight"].parts[0][:3] == (1, 16, 16)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    table = roles(model)
    experts = "model.layers.0.mlp.experts"
    assert table[f"{experts}.gate_up_proj"].parts[0][:3] == (8, 24, 16)
    assert table[f"{experts}.down_proj"].parts[0][:3] == (4, 16, 24)
    # The halves are what the model takes for gates and ups.
    weights = model.get_parameter(f"{experts}.gate_up_proj")
    with torch.no_grad():
        weights[:, :24] = 0.0  # silu(0) up = 0
        out = model.model.layers[0].mlp(torch.randn(1, 5, 16))
    assert not (out[0] if isinstance(out, tuple) else out).any()


def test_stacks_that_may_hold_gates_and_ups_in_turn_are_left_whole():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.randn(4, 16, 48))  # (experts, width, 2 * hidden)
    model.experts.down_proj = nn.Parameter(torch.randn(4, 24, 16))
    assert roles(model)["experts.gate_up_proj"].parts[0].matrices == 4


def test_frozen_parameters_are_marked_and_not_counted():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    for parameter in (*model[0].parameters(), *model[2].parameters()):
        parameter.requires_grad_(False)
    table = roles(model, strict=True)  # the last layer's role is open, and does not matter
    assert [row.name for row in table if row.frozen] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert table.parameters_under("muon") == 64 and table.parameters_under("adamw") == 8
    assert "99 more are frozen" in repr(table) and repr(table).count("frozen: ") == 4 and "AMBIGUOUS" not in repr(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon(model, lr=0.1)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True, False, False]
    model[0].weight.requires_grad_(True)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight) and roles(model)["0.weight"].role is Role.MATRIX
