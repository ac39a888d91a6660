"""Checkpoints that know when they are damaged: what they hold, which one to use, loading. Writing: saving.py.

``checkpoints/step-N/`` holds three parts, ``model`` (weights and balancer), ``average`` (averaged weights, if the run
keeps them) and ``training`` (state of the optimizer), each in one safetensors file or in one per shard
(:mod:`quintic.engine.pieces`); ``state.json`` (numbers) and ``manifest.json`` (format version, size and SHA-256 of each
file). It is built as ``step-N.xxxxxxxx.tmp``, flushed and renamed. Which one is newest or best is read off the folders
and the metrics, never off a pointer file. Nothing is pickled, and no file is read that the manifest does not name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core import CheckpointError
from quintic.core.files import sha256_file
from quintic.core.ranks import ALONE, Ranks
from quintic.engine.pieces import Stored, part_files

__all__ = [
    "FORMAT",
    "TrainState",
    "check_fit",
    "clear_leftovers",
    "files_of",
    "list_checkpoints",
    "load_average",
    "load_model",
    "load_training",
    "load_weights",
    "parameter_names",
    "prune_checkpoints",
    "remove_checkpoint",
    "usable_checkpoint",
    "verify_checkpoint",
]

FORMAT = 3
"""Of what is written. Format 2 had whole tensors only, format 1 the state of the random generators too."""
_READABLE = (1, 2, 3)
_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-\d+(\.[0-9a-f]{8})?\.tmp")


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


def verify_checkpoint(path: Path, ranks: Ranks = ALONE) -> None:
    """Check format, sizes and hashes.

    Args:
        path: The checkpoint.
        ranks: All of them call this, and each reads a share of the files.

    Raises:
        CheckpointError: Something is missing, damaged or of a newer format; the message names the file.
    """
    found = None
    try:
        _verify_share(path, ranks)
    except CheckpointError as error:
        found = str(error)
    for problem in ranks.gather(found):
        if problem is not None:
            raise CheckpointError(problem)


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, SHA-256)} of the files of a checkpoint, all parts of one among them.

    Raises:
        CheckpointError: It is damaged, of a newer format, or lacks a part.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: no readable manifest.json") from error
    if version not in _READABLE:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, this version of Quintic reads formats up to {FORMAT}; "
            f"it was written by Quintic {manifest.get('quintic', '?')}"
        )
    if outside := [name for name in expected if name in ("", ".", "..") or "/" in name or "\\" in name]:
        raise CheckpointError(f"checkpoint {path} is damaged: its manifest names {outside[0]!r}, no file in it")
    parts = {part: part_files(path, part, expected) for part in ("model", "training")}
    if missing := [part for part, found in parts.items() if not found]:
        raise CheckpointError(f"checkpoint {path} is damaged: its manifest names no file of {missing[0]}")
    if "state.json" not in expected:
        raise CheckpointError(f"checkpoint {path} is damaged: its manifest does not name state.json")
    return expected


def files_of(path: Path, part: str) -> list[Path]:
    """The files of ``model``, ``average`` or ``training`` that a manifest names; none of an absent part.

    Raises:
        CheckpointError: The manifest is damaged.
    """
    return part_files(path, part, _manifest(path))


def _verify_share(path: Path, ranks: Ranks) -> None:
    expected = _manifest(path)
    for name, (size, digest) in list(expected.items())[ranks.rank :: ranks.world]:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its recorded hash")


def usable_checkpoint(
    folder: Path, warn: Callable[[str], None], first: int | None = None, ranks: Ranks = ALONE
) -> Path | None:
    """The newest checkpoint that verifies, or ``first`` if it does; None if there is no checkpoint at all.

    Args:
        folder: The ``checkpoints`` folder of a run.
        warn: Told of each damaged checkpoint that was passed over.
        first: Step to prefer (the best one).
        ranks: All of them call this.

    Raises:
        CheckpointError: There are checkpoints and all of them are damaged.
    """
    # What the first rank sees: on a shared disk another may still see the folder as it was.
    found = ranks.gather(list_checkpoints(folder))[0]
    steps = sorted(found, reverse=True)
    if first in found:
        steps = [first, *(step for step in steps if step != first)]
    for step in steps:
        try:
            verify_checkpoint(found[step], ranks)
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
    """Load the weights of a verified checkpoint into a model of the same shape; a divided one reads its pieces.

    Args:
        path: The checkpoint.
        model: Changed in place.
        averaged: Take the averaged weights where the run kept them: for use, not for training on.

    Raises:
        CheckpointError: The weights are of another model; the message names the first tensor that differs.
    """
    average = files_of(path, "average") if averaged else []
    load_weights(files_of(path, "model"), model, average)


def load_weights(files: Sequence[Path], model: nn.Module, instead: Sequence[Path] = ()) -> None:
    """Load weight files into a model.

    Args:
        files: Hold all weights together.
        model: Changed in place.
        instead: Files with other values of some of the weights, to take where they have any.

    Raises:
        CheckpointError: A file cannot be read, or is of another model; the message names the first tensor that differs.
    """
    stored, better = Stored(files), Stored(instead)
    check_fit({**stored.shapes, **better.shapes}, model, str(files[0]))
    own = model.state_dict()
    model.load_state_dict({name: (better if name in better.shapes else stored).read(name, own[name]) for name in own})


def check_fit(shapes: Mapping[str, Sequence[int]], model: nn.Module, origin: str) -> None:
    """Make sure that weights are of a model's names and shapes.

    Raises:
        CheckpointError: They are not; the message names the origin and the first tensor that differs.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | shapes.keys()):
        here = tuple(own[name].shape) if name in own else "nothing"
        there = tuple(shapes[name]) if name in shapes else "nothing"
        if here != there:
            raise CheckpointError(f"{origin} does not fit the model: {name} is {there} there and {here} here")


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load the optimizer's state of a verified checkpoint, divided as the model is, and return its numbers.

    Raises:
        CheckpointError: They are not what is written there, or the state is of another model's parameters.
    """
    stored = Stored(files_of(path, "training"))
    state, scalars = _numbers(path / "state.json")
    _unflatten_optimizer(model, optimizer, stored, scalars, path)
    return state


def _numbers(file: Path) -> tuple[TrainState, dict[str, Any]]:
    """The numbers of a run, and those of its optimizer."""
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(numbers, dict):
        raise CheckpointError(f"{file} holds a {type(numbers).__name__} where a JSON object was expected")
    wanted = {**{f.name: type(getattr(TrainState(), f.name)) for f in fields(TrainState)}, "optimizer": dict}
    for name in sorted(numbers.keys() | wanted.keys()):
        if name not in wanted:
            raise CheckpointError(f"{file} has {name!r}, which this version of Quintic does not know")
        kinds = (int, float) if wanted[name] is float else (wanted[name],)
        if name not in numbers and name != "optimizer":
            continue  # of an earlier format
        if type(numbers.get(name)) not in kinds or (wanted[name] is int and numbers[name] < 0):
            raise CheckpointError(f"{file} is damaged: {name!r} is {str(numbers.get(name))[:80]}")
    if not all(isinstance(loss, int | float) for loss in numbers.get("recent_losses", ())):
        raise CheckpointError(f"{file} is damaged: 'recent_losses' holds more than numbers")
    scalars = numbers.pop("optimizer")
    return TrainState(**numbers), scalars


def load_average(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averaged weights of a verified checkpoint, divided as others are; empty if the run keeps none."""
    stored = Stored(files_of(path, "average"))
    return {name: stored.read(name, like.get(name)) for name in stored.shapes}


def prune_checkpoints(folder: Path, keep_last: int, keep: Collection[int | None] = ()) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and those of the steps in ``keep``."""
    found = list_checkpoints(folder)
    for step in sorted(found)[:-keep_last]:
        if step not in keep:
            remove_checkpoint(found[step])


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; where a link stands for it, the link only: what it leads to, somebody has put there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves have left; for the start of a run, when nothing is being saved."""
    for path in folder.glob("step-*.tmp"):
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order in which an optimizer's state_dict numbers its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _unflatten_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: Stored, scalars: dict[str, Any], path: Path
) -> None:
    numbers = {name: index for index, name in enumerate(parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for full in [*stored.shapes, *scalars]:
        if full.startswith("rng."):  # format 1
            continue
        name, _, key = full.removeprefix("optimizer.").rpartition(":")
        if name not in numbers:
            raise CheckpointError(f"{path} does not fit the model: it has a state {full!r}, of no parameter here")
        value = scalars[full] if full in scalars else stored.read(full, parameters[name])
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
