"""Folders of the DeepSeek-V3 architecture: transformers loads ours, we load theirs, and what differs is named."""

import contextlib
import json
import os
import re
from dataclasses import replace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from quintic.core import CheckpointError, ConfigError
from quintic.data.tokenizer import Tokenizer
from quintic.lm import LanguageModel, LMConfig, generate
from quintic.lm.deepseek import load_deepseek, read_config, save_deepseek

transformers = pytest.importorskip("transformers")

TINY = replace(LMConfig(), vocab_size=264, route_scale=1.7, num_shared=2, rope_theta=20_000.0)
IDS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))


def lively(config, seed=0):
    """A model whose logits are not nearly uniform and whose selection bias matters."""
    model = LanguageModel(config, seed=seed).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
        for block in model.blocks[config.num_dense_layers :]:
            block.ffn.router.bias.copy_(torch.linspace(-0.3, 0.3, config.num_experts))
    return model


@pytest.mark.parametrize("q_rank", [0, 24])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_loads_our_folder(tmp_path, q_rank, shard_bytes):
    model = lively(replace(TINY, q_rank=q_rank))
    save_deepseek(model, tmp_path / "hf", Tokenizer.bytes(), shard_bytes=shard_bytes)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**9)
    if index.exists():
        saved = sum(t.nbytes for path in index.parent.glob("*.safetensors") for t in load_file(path).values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == saved
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-4
        prompt = IDS[:1, :10]
        text = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(generate(model, prompt[0].tolist(), max_tokens=30, temperature=0)) == text[0, 10:].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Whale é")["input_ids"] == Tokenizer.bytes().prompt("Whale é")
    assert tokenizer("Whale", "é")["input_ids"] == [i for t in ("Whale", "é") for i in Tokenizer.bytes().prompt(t)]
    config = theirs.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert tokenizer.model_max_length == TINY.context
    assert tokenizer.eos_token_id == Tokenizer.bytes().separator_id == theirs.generation_config.eos_token_id


def test_a_foreign_tokenizer_keeps_its_own_end_of_a_document(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "</s>": 1, "b": 2}, merges=[]))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "t.json"))
    save_deepseek(lively(TINY), tmp_path / "hf", Tokenizer.load(tmp_path / "t.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (3, "</s>", "</s>", 1)


def test_we_load_what_transformers_saved(tmp_path):
    c = TINY
    save_deepseek(lively(c), tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    model = load_deepseek(tmp_path / "theirs").eval()
    assert replace(model.config, balance_rate=c.balance_rate) == c
    with torch.no_grad():
        assert torch.equal(model(IDS), lively(c)(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_round_trip_is_exact(tmp_path, dtype):
    model = lively(TINY)
    if dtype == torch.float64:
        model.double()
    save_deepseek(model, tmp_path / "hf")
    again = load_deepseek(tmp_path / "hf", dtype=dtype)
    assert again.embedding.weight.dtype == dtype and again.rotation.is_complex()
    if dtype != torch.bfloat16:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.blocks[1].ffn.router.bias.dtype == torch.float32


def test_moonlight_s_own_configuration_is_understood(tmp_path):
    """Keys as in the folder published with the model; the weights are those of a small one."""
    save_deepseek(lively(TINY), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["rope_interleave"]
    config |= {
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "auto_map": {"AutoConfig": "x.Y"},
        "seq_aux": True,
        "ep_size": 1,
    }
    path.write_text(json.dumps(config))
    assert load_deepseek(tmp_path / "hf", context=16).config.rope_theta == 50000.0


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"attention_bias": True}, ConfigError, "attention_bias = True"),
        ({"n_group": 8}, ConfigError, "lm.top_k = 2 exceeds the 1 experts"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, ConfigError, "'yarn'"),
        ({"rope_parameters": [1]}, ConfigError, r"rotary positions \[1\]"),
        ({"rope_parameters": {"rope_theta": None}}, ConfigError, "rope_theta = None; expected a value of type float"),
        ({"hidden_size": None}, ConfigError, "hidden_size = None; expected a value of type int"),
        ({"hidden_size": 64.5}, ConfigError, "hidden_size = 64.5"),
        ({"norm_topk_prob": "false"}, ConfigError, "norm_topk_prob = 'false'; expected a value of type bool"),
        ({"quantization_config": {"quant_method": "fp8"}}, ConfigError, "quantized .*fp8.* convert"),
        ({"num_hidden_layers": 1}, CheckpointError, r"has a tensor model\.layers\.1\.\S+, for which"),
        ({"hidden_size": 32}, CheckpointError, r"model.embed_tokens.weight is \(264, 64\)"),
        ({"n_routed_experts": 9}, CheckpointError, r"no tensor model.layers.1.mlp.experts.8.gate_proj"),
        ({"num_hidden_layers": 4}, CheckpointError, r"no tensor model.layers.3.input_layernorm.weight"),
        # Sizes that nobody has the memory for, or the time to count to.
        ({"num_hidden_layers": 10**9}, CheckpointError, r"no tensor model.layers.3.input_layernorm.weight"),
        ({"n_routed_experts": 10**9}, CheckpointError, r"no tensor model.layers.1.mlp.experts.8.gate_proj.weight"),
        ({"hidden_size": 10**9}, CheckpointError, r"model.embed_tokens.weight is \(264, 64\)"),
        ({"hidden_size": 10**12}, ConfigError, "hidden_size = 1000000000000; expected less than 2147483648"),
        ({"hidden_size": 10**400}, ConfigError, "hidden_size = "),
        (
            {"max_position_embeddings": 10**12},
            ConfigError,
            "max_position_embeddings = 1000000000000; expected less than",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, error, words):
    save_deepseek(lively(TINY), tmp_path / "hf")
    edited(tmp_path / "hf", **change)
    with pytest.raises(error, match=words):
        load_deepseek(tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("lm_head.weight_scale_inv", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.3.enorm.weight", True),  # of a layer that predicts one token more, as in DeepSeek-V3's folder
    ],
)
def test_a_tensor_that_would_change_the_model_is_not_left_out(tmp_path, name, fine):
    save_deepseek(lively(TINY), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    more = {name: torch.zeros(2), "model.layers.3.eh_proj.weight": torch.zeros(2)}
    save_file({**load_file(path), **more}, tmp_path / "more")
    (tmp_path / "more").replace(path)
    with contextlib.nullcontext() if fine else pytest.raises(CheckpointError, match=re.escape(name)):
        load_deepseek(tmp_path / "hf")


@pytest.mark.parametrize(
    "index",
    [b"[]", b"\xff", b"[" * 200_000, b'{"weight_map": {"x": 3}}', b'{"weight_map": {"x": "../x"}}'],
)
def test_an_index_that_is_none_is_damage(tmp_path, index):
    save_deepseek(lively(TINY), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_deepseek(tmp_path / "hf")


@pytest.mark.parametrize("name", ["\ud800", "a" * 5000, "nowhere", "a\0b", "folder", "pipe"])
def test_an_index_that_names_no_file(tmp_path, name):
    save_deepseek(lively(TINY), tmp_path / "hf")
    (tmp_path / "hf" / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "hf" / "pipe")
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"is missing or no regular file"):
        load_deepseek(tmp_path / "hf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes have names here")
def test_weights_in_a_pipe_are_not_waited_for(tmp_path):
    save_deepseek(lively(TINY), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' is missing or no regular file"):
        load_deepseek(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to(torch.int8), "of type I8, expected F64 or F32"),
        (lambda t: t.to(torch.float8_e4m3fn), "of type F8_E4M3, expected"),
        (lambda t: t / 0, "has numbers that are not finite"),
    ],
)
def test_weights_that_are_no_finite_numbers(tmp_path, change, words):
    save_deepseek(lively(TINY), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    weights, name = load_file(path), "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**weights, name: change(weights[name])}, tmp_path / "changed")
    (tmp_path / "changed").replace(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} in .* {words}"):
        load_deepseek(tmp_path / "hf")


def test_a_dtype_that_no_model_here_has_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype = torch\.float16; expected one of torch\.float32, torch\.bfloat16"):
        load_deepseek(tmp_path / "nowhere", dtype=torch.float16)


def test_damage_is_an_error_and_nothing_is_overwritten(tmp_path):
    for content in (None, "{", "[3]", "3", "[" * 200_000):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"no readable config\.json"):
            load_deepseek(tmp_path)
    save_deepseek(lively(TINY), tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_deepseek(tmp_path / "hf")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_deepseek(tmp_path / "hf")
    with pytest.raises(FileExistsError):
        save_deepseek(lively(TINY), tmp_path / "hf")


def test_a_scale_that_was_computed_is_written(tmp_path):
    """Not the 0 that asked for it: the folder would silence the experts."""
    model = LanguageModel(LMConfig(), seed=0)
    assert model.config.route_scale == model.blocks[-1].ffn.router.scale > 0.5
    save_deepseek(model, tmp_path / "folder")
    ids = torch.arange(20)[None]
    assert torch.equal(load_deepseek(tmp_path / "folder")(ids), model(ids))
    assert read_config(tmp_path / "folder").route_scale == model.config.route_scale


def test_the_configuration_of_moonlight_is_its_preset(tmp_path):
    """The keys of the published folder, with the sizes of the report."""
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001, "bos_token_id": 163584, "ep_size": 1, "eos_token_id": 163585,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": True, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 163840,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_config(tmp_path) == LMConfig.preset("moonlight-16b-a3b")


def test_what_a_folder_calls_null_or_leaves_out(tmp_path):
    save_deepseek(lively(replace(TINY, num_shared=0)), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "q_lora_rank"))
    del config["rope_theta"], config["rope_parameters"]
    path.write_text(json.dumps(config))
    found = load_deepseek(tmp_path / "hf").config
    assert found == replace(TINY, num_shared=0, rope_theta=10_000.0, balance_rate=found.balance_rate)


def test_a_shorter_context(tmp_path):
    save_deepseek(lively(TINY), tmp_path / "hf")
    assert load_deepseek(tmp_path / "hf", context=16).config.context == 16
    assert load_deepseek(tmp_path / "hf").config.context == TINY.context


@pytest.mark.parametrize(
    "changes", [{"score": "softmax"}, {"select": "softmax"}, {"normalize_experts": "rms"}, {"dense": True}]
)
def test_what_a_folder_has_no_place_for_is_not_written(tmp_path, changes):
    with pytest.raises(ConfigError, match="sigmoid scores and ordinary experts only"):
        save_deepseek(LanguageModel(replace(TINY, **changes), seed=0), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
