"""Weights to start from: another run's, or a Hugging Face folder of the DeepSeek-V3 architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.core import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from quintic.engine import Settings

__all__ = ["Origin", "open_origin"]


@dataclass(frozen=True)
class Origin:
    """A trained model somewhere else."""

    folder: Path
    model: Any
    """Settings of the model (the task's own section)."""
    tokenizer: Path | None
    """Its ``tokenizer.json``, if it has one."""
    weights: Mapping[str, Tensor]
    """Its state dict."""

    def settings(self, task: str, settings: Settings) -> Settings:
        """Settings with the shape of this model and its tokenizer, except where the user said otherwise.

        Raises:
            CheckpointError: It reads tokens, and nothing says which.
        """
        if self.tokenizer is None and settings.sources.get("data.tokenizer", "given") != "given":
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json, without which its model can neither read nor write: put it "
                "there, or name the file with data.tokenizer=FILE"
            )
        why = f"from {self.folder}"
        for field in dataclasses.fields(self.model):
            if settings.sources[f"{task}.{field.name}"] != "given":
                settings = settings.derive(f"{task}.{field.name}", getattr(self.model, field.name), why)
        if self.tokenizer is not None and settings.sources.get("data.tokenizer") not in (None, "given"):
            settings = settings.derive("data.tokenizer", str(self.tokenizer.absolute()), why)
        return settings


def open_origin(folder: Path, task: str) -> Origin:
    """Read a run's best checkpoint, or a DeepSeek-V3 folder.

    Raises:
        CheckpointError: The folder is neither, or is a run of another task.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give one that quintic train or quintic export made")
    tokenizer = folder / "tokenizer.json"
    if (folder / "config.toml").is_file():
        from quintic.cli.wiring import load_run_model

        loaded = load_run_model(folder, "best", "cpu", "float32")
        if loaded.header["task"] != task:
            raise CheckpointError(f"{folder} is a run of task {loaded.header['task']}, not {task}; say --task")
        model, weights = loaded.settings[task], loaded.model.state_dict()
    elif (folder / "config.json").is_file() and task == "lm":
        from quintic.lm import load_deepseek

        found = load_deepseek(folder)
        model, weights = found.config, found.state_dict()
    else:
        raise CheckpointError(
            f"{folder} holds neither a run (config.toml) nor a DeepSeek-V3 model (config.json); "
            "give a folder that quintic train or quintic export made"
        )
    return Origin(folder, model, tokenizer if tokenizer.is_file() else None, weights)
