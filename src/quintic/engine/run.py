"""A run folder: ``config.toml``, ``run.json``, ``machine.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/``."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from quintic.core import CheckpointError
from quintic.core.files import atomic_write, check_folder, check_name, make_readable
from quintic.core.tensors import save_tensors
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.config import Settings
from quintic.engine.metrics import iter_metrics, validation_loss

__all__ = ["Run"]


class Run:
    """Paths and small records of one run.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.toml"
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        self.initial = folder / "initial.safetensors"
        """Weights to start from, if not the seed's."""

    @classmethod
    def refuse_existing(cls, folder: Path) -> None:
        """Make sure that a new run may use a folder.

        Raises:
            CheckpointError: It holds a run or anything else.
            ConfigError: It cannot be written, or its name cannot be written down.
        """
        check_name(folder)
        if (folder / "config.toml").exists():
            raise CheckpointError(
                f"{folder} holds a run already; continue it with: quintic resume {folder} - or choose another --out"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not an empty folder; choose another --out")
        check_folder(folder)

    @classmethod
    def create(
        cls, folder: Path, settings: Settings, header: Mapping[str, Any], initial: Mapping[str, Tensor] | None = None
    ) -> Run:
        """Make the folder and write the resolved configuration.

        Args:
            folder: The run folder.
            settings: All of them.
            header: Top-level keys of ``config.toml``.
            initial: Weights to start from instead of the seed's.

        Raises:
            CheckpointError: The folder is in use.
            ConfigError: It cannot be written.
        """
        cls.refuse_existing(folder)
        run = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if initial is not None:  # before the configuration, which makes the folder a run
            save_tensors({name: tensor.contiguous() for name, tensor in initial.items()}, run.initial)
            make_readable(run.initial)
        atomic_write(run.config_file, settings.to_toml(header))
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run.

        Raises:
            CheckpointError: The folder holds no run.
            ConfigError: Its name cannot be written down.
        """
        check_name(folder)
        if not (folder / "config.toml").is_file():
            what = "does not exist" if not folder.exists() else "holds no run (no config.toml)"
            raise CheckpointError(f"{folder} {what}; give the folder that quintic train printed, e.g. runs/laptop")
        return cls(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the system frees the lock if this one is killed.

        Raises:
            CheckpointError: Another process has it.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"another process is training in {self.folder}; wait for it, stop it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def header(self) -> dict[str, Any]:
        """Top-level keys of ``config.toml``: task, size, data paths, fingerprint.

        Raises:
            CheckpointError: The file is damaged.
        """
        try:
            return tomllib.loads(self.config_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.config_file} is damaged: {error}") from error

    def record_paths(self, paths: Sequence[str]) -> None:
        """Write into ``config.toml`` where the data is now.

        Raises:
            CheckpointError: The line of the old paths is not as it was written.
        """
        line = Settings({}).to_toml({"paths": paths}).strip()
        text = re.sub(r"^paths = .*$", lambda _: line, self.settings_text(), count=1, flags=re.MULTILINE)
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(text) == {**self.header(), "paths": list(paths)}:
                atomic_write(self.config_file, text)
                return
        raise CheckpointError(
            f"the paths in {self.config_file} are not in one line, as they were written; make it {line}"
        )

    def settings_text(self) -> str:
        """``config.toml`` as it stands."""
        return self.config_file.read_text(encoding="utf-8")

    def best_step(self) -> int | None:
        """Step of the existing checkpoint with the lowest validation loss; None if none was validated."""
        saved = list_checkpoints(self.checkpoints)
        losses = {
            row["step"]: loss
            for row in iter_metrics(self.metrics_file, containing='"val_loss"')
            if row["step"] in saved and (loss := validation_loss(row)) is not None
        }
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def record(self, **facts: Any) -> None:
        """Merge facts into ``run.json``; None takes one out.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = self.folder / "run.json"
        try:
            old = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and repeat") from error
        merged = {name: value for name, value in {**old, **facts}.items() if value is not None}
        atomic_write(path, json.dumps(merged, indent=1, ensure_ascii=False))

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` holds; nothing if there is none, or a damaged one."""
        return _object(self.folder / "run.json")

    def machine(self) -> dict[str, Any]:
        """What ``machine.json`` holds; nothing if there is none, or a damaged one."""
        return _object(self.folder / "machine.json")

    def record_machine(self, facts: Mapping[str, Any]) -> None:
        """Write ``machine.json``."""
        atomic_write(self.folder / "machine.json", json.dumps(facts, indent=1))


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
