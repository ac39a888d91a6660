"""Writing checkpoints that are whole or absent: each rank its pieces, in the background if asked to.

What a rank has to write is chosen without communication and, to be written while training goes on, copied first. A save
is begun, written and finished by all ranks together: if one fails, none goes on as if there were a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quintic
from quintic.core import CheckpointError
from quintic.core.files import atomic_folder, fsync_path, sha256_file
from quintic.core.ranks import ALONE, Ranks
from quintic.engine.checkpoint import FORMAT, TrainState, parameter_names, remove_checkpoint
from quintic.engine.pieces import Held, held_here, save_held

__all__ = ["Saver", "Snapshot", "take_snapshot", "write_checkpoint"]


class Snapshot(NamedTuple):
    """What this rank has to write of a checkpoint."""

    parts: dict[str, Held]
    numbers: dict[str, Any]
    step: int


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    average: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    *,
    copy: bool = False,
) -> Snapshot:
    """Gather what this rank has to write; no communication.

    Args:
        model: Its weights and buffers.
        optimizer: Its state.
        state: Numbers of the run.
        average: Averaged weights, if there are any.
        ranks: The processes that train together.
        copy: Whether training goes on before it is written.
    """
    tensors, scalars = _flatten_optimizer(model, optimizer)
    parts = {"model": model.state_dict(), "training": tensors, **({"average": average} if average else {})}
    held = {name: held_here(part, shard=ranks.shard, shards=ranks.shards, copy=copy) for name, part in parts.items()}
    return Snapshot(held, {**asdict(state), "optimizer": scalars}, state.step)


def write_checkpoint(folder: Path, snapshot: Snapshot, ranks: Ranks = ALONE) -> Path:
    """Write ``folder/step-N`` and return it; one that is there already (a rerun after a crash) is replaced.

    Args:
        folder: The ``checkpoints`` folder of a run, which all ranks see.
        snapshot: Of this rank.
        ranks: All of them call this.

    Raises:
        CheckpointError: The disk has not enough room, or another rank failed; nothing was written or removed.
        OSError: Writing failed here; nothing remains of it.
    """
    target = folder / f"step-{snapshot.step}"
    needed = int(ranks.sum(sum(part.nbytes for part in snapshot.parts.values()))[0])
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            if not ranks.is_main:
                return folder  # the first one's answer counts
            _check_room(folder, needed)
            if os.path.lexists(target):
                remove_checkpoint(target)
            return stack.enter_context(atomic_folder(target))

        def write() -> dict[str, dict[str, Any]]:
            if not temporary.is_dir():
                raise CheckpointError(
                    f"{temporary}, made by the first rank, is not there: is {folder} on a shared disk?"
                )
            paths = [save_held(temporary, name, part) for name, part in snapshot.parts.items()]
            if ranks.is_main:
                (temporary / "state.json").write_text(json.dumps(snapshot.numbers), encoding="utf-8")
                paths.append(temporary / "state.json")
            return {path.name: _identity(path) for path in paths if path is not None}

        def finish() -> None:
            if ranks.is_main:
                versions = {"format": FORMAT, "quintic": quintic.__version__, "torch": torch.__version__}
                manifest = {**versions, "files": {name: entry for own in files for name, entry in sorted(own.items())}}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            stack.close()  # flushed and renamed

        temporary = ranks.together(begin)[0]
        files = ranks.together(write)
        ranks.together(finish)
    return target


def _identity(path: Path) -> dict[str, Any]:
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


class Saver:
    """Writes checkpoints of a run, in the background if asked to.

    Args:
        folder: The ``checkpoints`` folder of the run.
        ranks: The processes that train together; all of them make a saver and call it at the same places.
        background: Copy the state and return; a thread writes it while training goes on, one checkpoint at a time.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE, *, background: bool = False) -> None:
        self._folder = folder
        self._ranks = ranks
        self._apart = ranks.apart() if background else ranks
        self._pool = ThreadPoolExecutor(1, "save") if background else None
        self._pending: Future[Path] | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint, once the one before is written.

        Raises:
            CheckpointError, OSError: As :func:`write_checkpoint`, of this checkpoint or of the one before.
        """
        self.wait()
        snapshot = take_snapshot(model, optimizer, state, average, self._ranks, copy=self._pool is not None)
        if self._pool is None:
            write_checkpoint(self._folder, snapshot, self._ranks)
        else:
            self._pending = self._pool.submit(write_checkpoint, self._folder, snapshot, self._apart)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish what was begun, also when training fails."""
        if self._pool is not None:
            self._pool.shutdown()
        if kind is None:
            self.wait()

    def wait(self) -> None:
        """Until what was begun is on the disk.

        Raises:
            CheckpointError, OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    least = 1.01 * needed + 2**20  # for headers, names and the records beside it
    if free < least:
        raise CheckpointError(
            f"the disk of {folder} has {free // 2**20:,} MiB free and a checkpoint needs "
            f"{math.ceil(least / 2**20):,} MiB; make room and resume: the checkpoints before this one are intact"
        )


def _flatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    names = parameter_names(model, optimizer)
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            name = f"optimizer.{names[index]}:{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                scalars[name] = value
    return tensors, scalars
