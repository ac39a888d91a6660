"""Checkpoints that are whole or absent, and that know when they are damaged.

``checkpoints/step-N/`` holds ``model.safetensors`` (weights and balancer), ``average.safetensors`` (averaged
weights, if the run keeps them), ``training.safetensors`` (state of the optimizer), ``state.json`` (numbers)
and ``manifest.json`` (format version, size and SHA-256 of each file). It is built as ``step-N.tmp``, flushed and
renamed. Which one is newest or best is read off the folders and the metrics, never off a pointer file. Nothing is
pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quintic
from quintic.core import CheckpointError
from quintic.core.files import atomic_folder, sha256_file
from quintic.engine.mesh import ALONE, Ranks
from quintic.engine.shard import shard_like, whole

__all__ = [
    "FORMAT",
    "TrainState",
    "check_fit",
    "list_checkpoints",
    "load_average",
    "load_model",
    "load_training",
    "load_weights",
    "prune_checkpoints",
    "save_checkpoint",
    "usable_checkpoint",
    "verify_checkpoint",
]

FORMAT = 2
"""Of what is written. Format 1 held the state of the random generators too, which no step depends on any more."""
_READABLE = (1, 2)
_NAME = re.compile(r"step-(\d+)")


@dataclass
class TrainState:
    """The numbers of a run that are not tensors."""

    step: int = 0
    """Optimizer steps taken; with the seed it is also the position in the data."""
    counted: int = 0
    """Elements (tokens) trained on."""
    clipped: int = 0
    """Steps whose gradient was clipped."""
    seconds: float = 0.0
    """Time spent in training steps."""
    skipped_in_a_row: int = 0
    """Last steps that were left out because their loss or gradient was not finite."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, by which a spike is told."""
    clipping: dict[str, Any] = field(default_factory=dict)
    """State of the gradient clipping (its memory of norms)."""
    row: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step; written to the metrics file once it is complete."""


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: folder} of the complete checkpoints, oldest first. Unfinished ones end in ``.tmp``."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    average: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``folder/step-N`` and return it; one that is there already (a rerun after a crash) is replaced.

    Args:
        folder: The ``checkpoints`` folder of a run.
        model: Its weights and buffers.
        optimizer: Its state.
        state: Numbers of the run.
        average: Averaged weights, if there are any.
        ranks: All of them call this; divided tensors are put together and the main rank writes.

    Raises:
        CheckpointError: The disk has not enough room; nothing was written or removed.
    """
    target = folder / f"step-{state.step}"
    tensors, scalars = _flatten_optimizer(model, optimizer)
    parts = {"model": model.state_dict(), "training": tensors, **({"average": average} if average else {})}
    # What a checkpoint holds does not depend on the number of ranks, so any other number can resume it.
    parts = {part: {name: whole(t).contiguous() for name, t in held.items()} for part, held in parts.items()}
    if not ranks.is_main:
        ranks.wait()
        return target
    _check_room(folder, sum(tensor.nbytes for part in parts.values() for tensor in part.values()))
    if target.exists():
        shutil.rmtree(target)
    with atomic_folder(target) as temporary:
        for name, part in parts.items():
            save_file(part, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({**asdict(state), "optimizer": scalars}), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "quintic": quintic.__version__, "torch": torch.__version__, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    ranks.wait()
    return target


def verify_checkpoint(path: Path) -> None:
    """Check format, sizes and hashes.

    Raises:
        CheckpointError: Something is missing, damaged or of a newer format; the message names the file.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: no readable manifest.json") from error
    if version not in _READABLE:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, this version of Quintic reads formats up to {FORMAT}; "
            f"it was written by Quintic {manifest.get('quintic', '?')}"
        )
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its recorded hash")


def usable_checkpoint(folder: Path, warn: Callable[[str], None], first: int | None = None) -> Path | None:
    """The newest checkpoint that verifies, or ``first`` if it does; None if there is no checkpoint at all.

    Args:
        folder: The ``checkpoints`` folder of a run.
        warn: Told of each damaged checkpoint that was passed over.
        first: Step to prefer (the best one).

    Raises:
        CheckpointError: There are checkpoints and all of them are damaged.
    """
    found = list_checkpoints(folder)
    steps = sorted(found, reverse=True)
    if first in found:
        steps = [first, *(step for step in steps if step != first)]
    for step in steps:
        try:
            verify_checkpoint(found[step])
        except CheckpointError as error:
            warn(f"{error}; trying another one")
            continue
        return found[step]
    if found:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; restore one from a backup, or start again with "
            "quintic train and another --out"
        )
    return None


def load_model(path: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Load the weights of a verified checkpoint into a model of the same shape.

    Args:
        path: The checkpoint.
        model: Changed in place.
        averaged: Take the averaged weights where the run kept them: for use, not for training on.

    Raises:
        CheckpointError: The weights are of another model; the message names the first tensor that differs.
    """
    files = [path / "model.safetensors"]
    if averaged and (path / "average.safetensors").exists():
        files.append(path / "average.safetensors")
    load_weights(files, model)


def load_weights(files: Sequence[Path], model: nn.Module) -> None:
    """Load weight files into a model; where two hold the same tensor, the later one counts.

    Raises:
        CheckpointError: A file cannot be read, or is of another model; the message names the first tensor that differs.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    check_fit(weights, model, str(files[0]))
    model.load_state_dict(weights)


def check_fit(weights: Mapping[str, Tensor], model: nn.Module, origin: str) -> None:
    """Make sure that weights are of a model's names and shapes.

    Raises:
        CheckpointError: They are not; the message names the origin and the first tensor that differs.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here = tuple(own[name].shape) if name in own else "nothing"
        there = tuple(weights[name].shape) if name in weights else "nothing"
        if here != there:
            raise CheckpointError(f"{origin} does not fit the model: {name} is {there} there and {here} here")


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load the optimizer's state of a verified checkpoint, and return its numbers."""
    tensors = load_file(path / "training.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}  # format 1
    numbers = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _unflatten_optimizer(model, optimizer, tensors, numbers.pop("optimizer"))
    return TrainState(**numbers)


def load_average(path: Path) -> dict[str, Tensor]:
    """Averaged weights of a verified checkpoint; empty if the run keeps none."""
    file = path / "average.safetensors"
    return load_file(file) if file.exists() else {}


def prune_checkpoints(folder: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the best one, and leftovers of killed saves."""
    found = list_checkpoints(folder)
    for step in sorted(found)[:-keep_last]:
        if step != best:
            shutil.rmtree(found[step])


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.01 * needed + 2**20:
        raise CheckpointError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB free and the checkpoint needs "
            f"{needed / 2**20:,.0f} MiB; make room and resume: the checkpoints before this one are intact"
        )


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order in which an optimizer's state_dict numbers its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _flatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    names = _parameter_names(model, optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            name = f"optimizer.{names[index]}:{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                scalars[name] = value
    return tensors, scalars


def _unflatten_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    numbers = {name: index for index, name in enumerate(_parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for full, value in {**tensors, **scalars}.items():
        name, key = full.removeprefix("optimizer.").rsplit(":", 1)
        if isinstance(value, Tensor):
            value = shard_like(value, parameters[name])
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
