"""State dicts of the authors' implementation (apple/ml-tarflow), read into a :class:`TarFlow`.

Sizes follow from the tensors. Three things are stored otherwise there: position tables lie in the image's order, "no
label" is the mean of the class rows, and a buffer ``attn_mask`` of ones and zeros is of no use. The flow itself is
the same: latents and log-determinants agree.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quintic.core import CheckpointError
from quintic.flow.tarflow import TarFlow

__all__ = ["load_reference"]

_NAMES = (
    (r"^blocks\.(\d+)\.proj_in\.", r"blocks.\1.enter."),
    (r"^blocks\.(\d+)\.proj_out\.", r"blocks.\1.leave."),
    (r"^blocks\.(\d+)\.pos_embed$", r"blocks.\1.position"),
    (r"^blocks\.(\d+)\.class_embed$", r"blocks.\1.classes"),
    (r"\.attn_blocks\.(\d+)\.attention\.norm\.", r".layers.\1.attention_norm."),
    (r"\.attn_blocks\.(\d+)\.attention\.qkv\.", r".layers.\1.qkv."),
    (r"\.attn_blocks\.(\d+)\.attention\.proj\.", r".layers.\1.mix."),
    (r"\.attn_blocks\.(\d+)\.mlp\.norm\.", r".layers.\1.mlp_norm."),
    (r"\.attn_blocks\.(\d+)\.mlp\.main\.0\.", r".layers.\1.up."),
    (r"\.attn_blocks\.(\d+)\.mlp\.main\.2\.", r".layers.\1.down."),
)


def load_reference(
    source: Mapping[str, Tensor] | Path | str,
    shape: tuple[int, int, int],
    *,
    head_width: int = 64,
    noise: str = "gaussian",
    sigma: float = 0.05,
) -> TarFlow:
    """A flow with the weights of a state dict of apple/ml-tarflow.

    Args:
        source: The state dict, or a file of it: ``.safetensors``, else a torch file, which is read without running
            pickled code.
        shape: (channels, height, width) of the images; the file does not tell.
        head_width: Of attention; theirs is always 64.
        noise: What it was trained with, ``gaussian`` or ``uniform``.
        sigma: Of gaussian noise; the file does not tell. 0.05 was used for 64 x 64 pixels, 0.15 for 128 x 128.

    Raises:
        CheckpointError: The file is missing, or holds something else, or a flow of other images.
    """
    state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    try:
        arguments = _arguments(state, shape)
        model = TarFlow(shape, head_width=head_width, noise=noise, sigma=sigma, initialize=False, **arguments)
        model.to(state["blocks.0.proj_in.weight"].dtype)
        model.load_state_dict(_translate(state, arguments["learned_prior"]))
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"this is no state dict of ml-tarflow for images {shape}: {error}") from error
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"cannot read {path} as a state dict of tensors: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected a state dict")
    return found


def _arguments(state: dict[str, Tensor], shape: tuple[int, int, int]) -> dict[str, Any]:
    width, numbers = state["blocks.0.proj_in.weight"].shape
    tokens = len(state["blocks.0.pos_embed"])
    patch = math.isqrt(numbers // shape[0])
    if patch * patch * shape[0] != numbers or tokens * patch * patch != shape[1] * shape[2]:
        raise CheckpointError(f"{tokens} tokens of {numbers} numbers do not make images of shape {shape}")
    classes = state.get("blocks.0.class_embed")
    return {
        "patch": patch,
        "width": width,
        "blocks": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "layers": 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.0\.attn_blocks\.(\d+)\.", key))),
        "num_classes": 0 if classes is None else len(classes),
        "volume_preserving": len(state["blocks.0.proj_out.weight"]) == numbers,
        "learned_prior": "var" in state and bool((state["var"] != 1).any()),
    }


def _translate(state: dict[str, Tensor], learned_prior: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(".attn_mask"):
            continue
        if key == "var":
            if learned_prior:
                found["prior_log_variance"] = tensor.log()
            continue
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".position") and int(name.split(".")[1]) % 2:
            tensor = tensor.flip(0)
        if name.endswith(".classes"):
            tensor = torch.cat([tensor[:, 0], tensor.mean(0)])
        found[name] = tensor
    return found
