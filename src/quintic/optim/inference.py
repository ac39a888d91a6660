"""What a parameter is if nobody declared it: told by its module's type, by tied weights, and by names where they must.

Names decide only what types cannot: the output head, and whether a matrix is several (queries, keys and values).
What cannot be told is marked ambiguous: parameters of unknown modules go to AdamW, and a last linear layer
that may or may not be the output goes to Muon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from quintic.core import ConfigError
from quintic.core.roles import ParameterRole, Role, Split

__all__ = ["Guess", "infer"]

_HEAD_NAMES = {"lm_head", "head", "output", "classifier", "unembed", "unembedding", "embed_out", "to_logits", "score"}
_LAST_NAMES = {*_HEAD_NAMES, "fc"}  # of a last layer only: others are called so too
_FUSED_NAMES = {"c_attn", "qkv", "qkv_proj", "wqkv", "to_qkv"}
"""Queries, keys and values one after the other; other names mix the three head by head."""
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Guess(NamedTuple):
    """A role, and how the tensor is read as matrices (:mod:`quintic.optim.split`)."""

    role: Role
    why: str
    layout: str | None = None
    ambiguous: bool = False
    split: Split | None = None
    orientation: str = "out_in"


def infer(model: nn.Module, declared: Mapping[str, ParameterRole]) -> dict[str, Guess]:
    """Roles by module type, for every parameter, under the name that ``named_parameters`` gives it."""
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    vocabularies = {tuple(m.weight.shape) for m in modules if isinstance(m, nn.Embedding)}
    inner = {m.out_proj for m in modules if isinstance(m, nn.MultiheadAttention)}  # never a model's output
    linears = [m for m in modules if isinstance(m, nn.Linear) and m not in inner]
    tied = tables & {id(m.weight) for m in linears}
    output = getattr(model, "get_output_embeddings", lambda: None)()  # Hugging Face models name their head
    head = id(output.weight) if isinstance(output, nn.Linear) else None
    first = next((m for m in modules if isinstance(m, (nn.Linear, *_CONV))), None)

    found: dict[str, Guess] = {}
    last_linear = None
    seen: set[int] = set()
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{local}" if path else local
            if _is_gain(module, local):
                found[name] = Guess(Role.VECTOR, "gains of a normalised weight")
                continue
            place, owner, tensor = _owner(model, path, module, local)
            guess = _infer_one(place, owner, tensor, parameter, is_first=owner is first)
            if isinstance(owner, nn.Linear) and tensor == "weight" and owner not in inner:
                last_linear = name
                if id(parameter) in tied:
                    guess = Guess(Role.HEAD, "tied to an embedding")
                elif id(parameter) == head:
                    guess = Guess(Role.HEAD, "the model's output embedding")
                elif place.rsplit(".", 1)[-1].lower() in _HEAD_NAMES:
                    guess = Guess(Role.HEAD, "output layer by name")
                elif owner is linears[-1] and _named_as_last(place):
                    guess = Guess(Role.HEAD, "last layer, and output layer by name")
                elif tuple(parameter.shape) in vocabularies and owner is linears[-1]:
                    guess = Guess(Role.HEAD, "last layer, as large as the embedding")
            elif id(parameter) in tied:
                guess = Guess(Role.EMBEDDING, "embedding, tied to the output layer")
            found[name] = guess
    known = [*(d.role for d in declared.values()), *(g.role for name, g in found.items() if name not in declared)]
    if last_linear is not None and last_linear not in declared and Role.HEAD not in known and not tied:
        why = "last linear layer; should it be the output layer, it belongs to AdamW"
        found[last_linear] = Guess(Role.MATRIX, why, "stack", ambiguous=True)
    return found


def _is_gain(module: nn.Module, local: str) -> bool:
    """Whether a parameter is the length that torch's weight normalisation, of either kind, gives to a direction."""
    if local.endswith("_g") and f"{local[:-2]}_v" in module._parameters:
        return True
    if not isinstance(module, ParametrizationList) or local != "original0":
        return False
    return any(type(p).__name__ == "_WeightNorm" for p in module)  # private; spectral and orthogonal have one tensor


def _owner(model: nn.Module, path: str, module: nn.Module, local: str) -> tuple[str, nn.Module, str]:
    """The layer that a parameter is a weight of: its own module, unless that only computes the layer's weight."""
    if isinstance(module, ParametrizationList):
        place, _, tensor = f".{path}".rpartition(".parametrizations.")
        return place[1:], model.get_submodule(place[1:]), tensor
    return path, module, local.removesuffix("_v") if f"{local[:-2]}_g" in module._parameters else local


def _named_as_last(path: str) -> bool:
    """Whether a last layer has, or lies in, an output's name: head.fc, classifier.6; not layers.11.output.dense."""
    for part in path.lower().split("."):
        if part.isdigit():
            return False
        if part in _LAST_NAMES:
            return True
    return False


def _infer_one(path: str, module: nn.Module, local: str, parameter: nn.Parameter, *, is_first: bool) -> Guess:
    """What the module's type says of one of its parameters."""
    kind = type(module).__name__
    if parameter.ndim < 2 and local == "weight" and isinstance(module, (nn.Linear, nn.Embedding, *_CONV)):
        raise ConfigError(
            f"{path or kind}.weight of {kind} has shape {tuple(parameter.shape)}: it was flattened or sharded away. "
            "Shard with torch's fully_shard, which keeps shapes, or make the optimizer before"
        )
    if parameter.ndim < 2:
        return Guess(Role.VECTOR, f"{local} of {kind}")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Guess(Role.EMBEDDING, "embedding")
    if parameter.ndim == 2 and (isinstance(module, nn.Linear) or ("Linear" in kind and local == "weight")):
        if path.rsplit(".", 1)[-1].lower() in _FUSED_NAMES and parameter.shape[0] == 3 * parameter.shape[1]:
            return Guess(Role.MATRIX, "queries, keys and values by name", "stack", split={"blocks": 3})
        return Guess(Role.MATRIX, f"{local} of {kind}", "stack")
    if isinstance(module, _CONV):
        if is_first:
            return Guess(Role.MATRIX, "first convolution: its inputs are pixels, not features")
        if module.groups > 1:
            return Guess(Role.MATRIX, "grouped convolution: not one matrix")
        return Guess(Role.MATRIX, f"{kind} as (out, in * kernel)", "conv")
    if isinstance(module, _CONV_TRANSPOSED):
        return Guess(Role.MATRIX, "transposed convolution: its first axis is the input")
    if isinstance(module, nn.MultiheadAttention) and parameter.ndim == 2:
        fused: Split | None = {"blocks": 3} if local == "in_proj_weight" else None
        return Guess(Role.MATRIX, "attention projection", "stack", split=fused)
    if kind == "Conv1D" and parameter.ndim == 2:
        why, three = "Hugging Face's Conv1D, a matrix (in, out)", parameter.shape[1] == 3 * parameter.shape[0]
        if path.rsplit(".", 1)[-1] in _FUSED_NAMES and three:
            return Guess(Role.MATRIX, f"{why}: queries, keys, values", "stack", False, {"blocks": 3}, "in_out")
        return Guess(Role.MATRIX, why, "stack", orientation="in_out")
    if isinstance(module, nn.RNNBase):
        return Guess(Role.MATRIX, "recurrent weights, all gates as one matrix", "stack")
    if parameter.ndim == 2 and "Router" in kind:
        return Guess(Role.ROUTER, f"{local} of {kind}", "stack")
    if "Norm" in kind or "bias" in local:
        return Guess(Role.VECTOR, f"{local} of {kind}")
    if parameter.ndim == 3 and (_EXPERT_NAME.search(f"{path}.{local}") or _EXPERT_NAME.search(kind)):
        if _is_gate_and_up(module, local):
            return Guess(Role.EXPERT_STACK, "gates and ups of a module of experts", "stack", split={"blocks": 2})
        return Guess(Role.EXPERT_STACK, "three axes in a module of experts", "stack")
    return Guess(Role.VECTOR, f"{local} of {kind}: {parameter.ndim} axes, role not declared, so AdamW", ambiguous=True)


def _is_gate_and_up(module: nn.Module, local: str) -> bool:
    """Whether a stack is (experts, 2 * hidden, width) beside one that goes back, (experts, width, hidden).

    Stacks (experts, width, 2 * hidden) are left whole: some models have gates and ups there in turn.
    """
    up, down = module._parameters[local], module._parameters.get(local.replace("gate_up", "down"))
    if "gate_up" not in local or up is None or down is None:
        return False
    return down.ndim == 3 and tuple(up.shape[1:]) == (2 * down.shape[2], down.shape[1])
