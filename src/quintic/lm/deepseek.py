"""Language models as Hugging Face folders of the DeepSeek-V3 architecture, Moonlight's among them.

On disk every expert has its own tensors and gate and up projections are apart; here they are stacked and fused. An
entry says which part of a tensor here is which tensor there, so that writing and reading are one table. Nothing is
executed and nothing but JSON and safetensors is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from quintic.core import CheckpointError, ConfigError
from quintic.core.files import atomic_folder
from quintic.core.machine import DTYPES
from quintic.core.tensors import save_tensors
from quintic.data.tokenizer import Tokenizer
from quintic.lm.config import LMConfig
from quintic.lm.model import LanguageModel

__all__ = ["load_deepseek", "read_config", "save_deepseek"]

_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "d_expert",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "n_shared_experts": "num_shared",
    "n_routed_experts": "num_experts",
    "routed_scaling_factor": "route_scale",
    "kv_lora_rank": "kv_rank",
    "qk_rope_head_dim": "qk_rope_dim",
    "qk_nope_head_dim": "qk_nope_dim",
    "v_head_dim": "v_dim",
    "num_experts_per_tok": "top_k",
    "first_k_dense_replace": "num_dense_layers",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_eps",
    "n_group": "num_groups",
    "topk_group": "top_groups",
    "norm_topk_prob": "normalize_gates",
}
"""Settings there and here that mean the same."""

_FIXED = {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "moe_layer_freq": 1,
}
"""What this implementation computes; a folder that says otherwise is refused."""


_LARGEST = 1 << 31
"""No size in a configuration is as large."""
_LONGEST = 1 << 24
"""Nor a context: unlike other sizes, no tensor of a folder tells whether it is true."""

_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors names them."""


def save_deepseek(
    model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None, *, shard_bytes: int = 4 * 10**9
) -> None:
    """Write a folder that ``transformers.AutoModelForCausalLM`` loads.

    Args:
        model: Its weights are written in their dtype, under DeepSeek-V3's names.
        folder: Must not exist; appears whole or not at all.
        tokenizer: Written beside the weights, with the files that it came with.
        shard_bytes: Largest size of one weight file; more than one get an index.

    Raises:
        FileExistsError: The folder exists.
        ConfigError: The architecture has no place for the model's scores, normalised experts or dense baseline.
    """
    c = model.config
    if c.dense or c.normalize_experts or {c.score, c.routing["select"]} != {"sigmoid"}:
        raise ConfigError(
            "a DeepSeek-V3 folder holds sigmoid scores and ordinary experts only; this model has "
            f"score = {c.score!r}, select = {c.select!r}, normalize_experts = {c.normalize_experts!r}, "
            f"dense = {c.dense}"
        )
    files = {} if tokenizer is None else tokenizer.files(model.config.context)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for entry in _entries(model.config):
        tensor = state[entry.ours][entry.part].cpu().contiguous().clone()
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][entry.theirs] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    with atomic_folder(folder) as out:
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            _write(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
        for name, shard in zip(names, shards, strict=True):
            save_tensors(shard, out / name, {"format": "pt"})
        ends = json.loads(files.get("generation_config.json", "{}"))  # without them transformers takes its class's own
        ends = {name: ends[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in ends}
        _write(out / "config.json", _foreign_config(model.config, next(iter(state.values())).dtype) | ends)
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")


def load_deepseek(folder: Path | str, *, dtype: torch.dtype = torch.float32, context: int = 0) -> LanguageModel:
    """Read such a folder; weights in one file or in shards with an index.

    Args:
        folder: With ``config.json`` and ``*.safetensors``.
        dtype: Of the model: float32, bfloat16 or float64.
        context: Longest sequence; 0 is the folder's own.

    Raises:
        CheckpointError: A file or tensor is missing, damaged or of another shape; the message names it.
        ConfigError: The folder is of an architecture that this model does not compute, or the dtype is another.
    """
    if dtype not in (known := DTYPES.values()):
        raise ConfigError(f"dtype = {dtype}; expected one of {', '.join(map(str, known))}")
    folder = Path(folder)
    config = read_config(folder, context=context)
    files = _weight_files(folder)
    try:
        opened = {name: safe_open(folder / name, framework="pt") for name in set(files.values())}
        _check_headers(folder, config, {name: opened[file] for name, file in files.items()})
        model = LanguageModel(config, initialize=False).to(dtype)
        state = model.state_dict()
        with torch.no_grad():
            for entry in _entries(config):
                target = state[entry.ours][entry.part]
                target.copy_(opened[files[entry.theirs]].get_tensor(entry.theirs))
                if not target.isfinite().all():
                    raise CheckpointError(f"{entry.theirs} in {folder} has numbers that are not finite")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
    return model


def _check_headers(folder: Path, config: LMConfig, opened: Mapping[str, Any]) -> None:
    """Make sure that the files hold the tensors of a model, before anything is as large as ``config.json`` says.

    Args:
        folder: For messages.
        config: The model's.
        opened: {tensor: the file that has it}.

    Raises:
        CheckpointError: A tensor is missing, of another shape, no floating-point number, or without a use.
    """
    unused = {name for name in opened if not name.endswith("inv_freq")}
    for entry in _entries(config):  # ends at the first that is missing, however many layers there should be
        if entry.theirs not in opened:
            raise CheckpointError(f"{folder} has no tensor {entry.theirs}, which config.json calls for")
        unused.discard(entry.theirs)
    # Layers that predict further tokens are left out.
    further = tuple(name.removesuffix("eh_proj.weight") for name in unused if name.endswith(".eh_proj.weight"))
    if unused := {name for name in unused if not name.startswith(further)}:
        raise CheckpointError(f"{folder} has a tensor {min(unused)}, for which the model of its config.json has no use")
    with torch.device("meta"):
        state = LanguageModel(config, initialize=False).state_dict()
    for entry in _entries(config):
        found = opened[entry.theirs].get_slice(entry.theirs)
        shape, target = tuple(found.get_shape()), tuple(state[entry.ours][entry.part].shape)
        if shape != target:
            raise CheckpointError(f"{entry.theirs} is {shape} in {folder} and {target} by config.json")
        if (kind := found.get_dtype()) not in _NUMBERS:
            raise CheckpointError(
                f"{entry.theirs} in {folder} is of type {kind}, expected {' or '.join(_NUMBERS)}; convert it first"
            )


def read_config(folder: Path, *, context: int = 0) -> LMConfig:
    """The settings of a model that ``config.json`` describes.

    Raises:
        CheckpointError: There is no readable ``config.json``.
        ConfigError: It describes what this model does not compute.
    """
    path = folder / "config.json"
    try:
        found = dict(_json(path))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: {error}") from error
    if how := found.get("quantization_config"):
        raise ConfigError(f"{path} says that the weights are quantized ({how}); convert the folder to bfloat16 first")
    for name, wanted in _FIXED.items():
        if name in found and found[name] != wanted:
            raise ConfigError(f"{path} has {name} = {found[name]!r}; this model computes {name} = {wanted!r} only")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{path} has rotary positions {rope!r}; expected an object with rope_type and rope_theta")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ConfigError(f"{path} has rotary positions of type {kind!r}; this model computes the default type only")
    if missing := [name for name in _SAME if name not in found]:
        raise CheckpointError(f"{path} does not say {missing[0]}; expected the config.json of a DeepSeek-V3 model")
    values: dict[str, Any] = {ours: found[theirs] for theirs, ours in _SAME.items()}
    values["num_shared"] = values["num_shared"] or 0
    values["num_groups"], values["top_groups"] = values["num_groups"] or 1, values["top_groups"] or 1
    values["q_rank"] = found.get("q_lora_rank") or 0
    values["rope_theta"] = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    values["context"] = context or values["context"]
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(LMConfig)}
    for name, value in values.items():
        number = isinstance(value, int | float) and isinstance(value, bool) == (kinds[name] is bool)
        expected = ""
        if not number or (kinds[name] is int and value != value // 1):
            expected = f"a value of type {kinds[name].__name__}"
        elif kinds[name] is int and value >= (bound := _LONGEST if name == "context" else _LARGEST):
            expected = f"less than {bound}"
        if expected:
            theirs = {ours: theirs for theirs, ours in _SAME.items()}.get(name, name)
            raise ConfigError(f"{path} has {theirs} = {value!r:.30}; expected {expected}")
    return LMConfig(**{name: kinds[name](value) for name, value in values.items()})


def _foreign_config(config: LMConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_FIXED,
        **{theirs: getattr(config, ours) for theirs, ours in _SAME.items()},
        "q_lora_rank": config.q_rank or None,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.qk_rope_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "num_nextn_predict_layers": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


class _Entry(NamedTuple):
    theirs: str
    ours: str
    part: Any = ...
    """Index into our tensor."""


def _entries(config: LMConfig) -> Iterator[_Entry]:
    """Every tensor of a folder, and the part of which tensor here it is."""
    yield _Entry("model.embed_tokens.weight", "embedding.weight")
    for index in range(config.num_layers):
        there, here = f"model.layers.{index}", f"blocks.{index}"
        yield _Entry(f"{there}.input_layernorm.weight", f"{here}.attention_norm.gain")
        attention = {"kv_a_proj_with_mqa": "kv_down", "kv_b_proj": "kv_up", "o_proj": "out"}
        attention |= {"q_a_proj": "q_down", "q_b_proj": "q"} if config.q_rank else {"q_proj": "q"}
        for theirs, ours in attention.items():
            yield _Entry(f"{there}.self_attn.{theirs}.weight", f"{here}.attention.{ours}.weight")
        for letter in ("q", "kv") if config.q_rank else ("kv",):
            yield _Entry(f"{there}.self_attn.{letter}_a_layernorm.weight", f"{here}.attention.{letter}_norm.gain")
        yield _Entry(f"{there}.post_attention_layernorm.weight", f"{here}.ffn_norm.gain")
        if index < config.num_dense_layers:
            yield from _swiglu(f"{there}.mlp", f"{here}.ffn", config.d_ff)
            continue
        yield _Entry(f"{there}.mlp.gate.weight", f"{here}.ffn.router.weight")
        yield _Entry(f"{there}.mlp.gate.e_score_correction_bias", f"{here}.ffn.router.bias")
        for number in range(config.num_experts):
            yield from _swiglu(f"{there}.mlp.experts.{number}", f"{here}.ffn.experts", config.d_expert, (number,))
        if config.num_shared:
            hidden = config.num_shared * config.d_expert
            yield from _swiglu(f"{there}.mlp.shared_experts", f"{here}.ffn.shared", hidden)
    yield _Entry("model.norm.weight", "norm.gain")
    yield _Entry("lm_head.weight", "head.weight")


def _swiglu(there: str, here: str, hidden: int, expert: tuple[int, ...] = ()) -> Iterator[_Entry]:
    yield _Entry(f"{there}.gate_proj.weight", f"{here}.gate_up", (*expert, slice(0, hidden)))
    yield _Entry(f"{there}.up_proj.weight", f"{here}.gate_up", (*expert, slice(hidden, 2 * hidden)))
    yield _Entry(f"{there}.down_proj.weight", f"{here}.down", expert or ...)


def _weight_files(folder: Path) -> dict[str, str]:
    """{tensor: file} of a folder, by its index or by looking into its one file.

    Raises:
        CheckpointError: There is neither, or the index is damaged or names what is no file of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = dict(_json(index)["weight_map"])
            for file in set(files.values()):
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is no file in the folder")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
    elif not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    else:
        files = {"": "model.safetensors"}
    for file in set(files.values()):
        if not os.path.isfile(folder / file):  # a pipe would be waited for
            raise CheckpointError(f"the weights in {folder} cannot be read: {file!a} is missing or no regular file")
    if index.exists():
        return files
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error


def _json(path: Path) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError("it is missing or no regular file")
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
