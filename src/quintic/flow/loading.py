"""Flows as single safetensors files, in half precision with their sizes, and those that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from quintic.assets import weights_names, weights_path
from quintic.core import CheckpointError, ConfigError
from quintic.core.files import atomic_write
from quintic.flow.tarflow import TarFlow

__all__ = ["load_flow", "save_flow", "shipped_flow", "shipped_flow_names"]

_KIND = "tarflow"


def save_flow(model: TarFlow, path: Path | str, **metadata: str) -> None:
    """Write a flow; weights are rounded to float16.

    Args:
        model: The flow.
        path: Of a ``.safetensors``.
        **metadata: More to keep in its header.
    """
    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(model.arguments, sort_keys=True)
    atomic_write(Path(path), save(halves, metadata={**metadata, "kind": _KIND, "config": config}))


def load_flow(path: Path | str) -> TarFlow:
    """Read what :func:`save_flow` wrote, as float32.

    Raises:
        CheckpointError: The file is missing, damaged or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, expected a file of save_flow; quintic.load_run reads the model of a run"
        )
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("kind") != _KIND:
            raise CheckpointError(
                f"{path} holds weights of another kind ({metadata.get('kind')}), expected {_KIND}; those of a run are "
                "read with its folder: quintic.load_run"
            )
        arguments = json.loads(metadata["config"])
        arguments["shape"] = tuple(arguments["shape"])
        model = TarFlow(**arguments, initialize=False)
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path} is not a file of a flow: {error}") from error
    return model.eval()


def shipped_flow_names() -> list[str]:
    """Names of the flows that come with the package."""
    return weights_names("tarflow")


def shipped_flow(name: str) -> TarFlow:
    """A flow that comes with the package; its card says on what it was trained.

    Raises:
        ConfigError: No flow has that name.
    """
    return load_flow(weights_path("tarflow", name))
