"""Weights to start from: another run's, or a Hugging Face folder of the DeepSeek-V3 architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.core import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from quintic.data import DataConfig, Tokenizer
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
    data: DataConfig | None = None
    """How its text became tokens, if it is a run of text."""

    def settings(self, task: str, settings: Settings) -> Settings:
        """Settings with the shape of this model and its tokenizer, except where the user said otherwise.

        Raises:
            CheckpointError: It reads tokens, and nothing says which.
            ConfigError: The user said a tokenizer whose ids mean other text to this model.
            DataError: A tokenizer cannot be read.
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
        if self.tokenizer is None or "data.tokenizer" not in settings.sources:
            return settings
        return self._with_tokenizer(self.tokenizer, settings, why)

    def _with_tokenizer(self, path: Path, settings: Settings, why: str) -> Settings:
        """Settings with the tokenizer of this model and its reading of texts."""
        from quintic.data import Tokenizer
        from quintic.data.config import OWN_TOKENIZERS

        own, text = self.data, settings["data"]
        given = {
            name for name in ("tokenizer", "separator", "special_tokens") if settings.sources[f"data.{name}"] == "given"
        }
        separator = text.separator if "separator" in given or own is None else own.separator
        tokenizer = Tokenizer.load(path, separator=separator)
        if own is None:  # config.json, which may have said it, is not taken along
            separator = tokenizer.separator
        wanted = {"tokenizer": str(path.absolute()), "separator": separator}
        if "tokenizer" in given:
            _refuse_another(text.tokenizer, tokenizer, self.folder)
            if text.tokenizer in OWN_TOKENIZERS:
                del wanted["separator"]
        if own is not None:
            wanted["special_tokens"] = own.special_tokens
        for name, value in wanted.items():
            if name not in given and value != getattr(text, name):
                settings = settings.derive(f"data.{name}", value, why)
        return settings


def open_origin(folder: Path, task: str) -> Origin:
    """Read a run's best checkpoint, or a DeepSeek-V3 folder.

    Raises:
        CheckpointError: The folder is neither, or is a run of another task.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give one that quintic train or quintic export made")
    tokenizer = folder / "tokenizer.json"
    data = None
    if (folder / "config.toml").is_file():
        from quintic.cli.wiring import load_run_model

        loaded = load_run_model(folder, "best", "cpu", "float32")
        if loaded.header["task"] != task:
            raise CheckpointError(f"{folder} is a run of task {loaded.header['task']}, not {task}; say --task")
        model, weights = loaded.settings[task], loaded.model.state_dict()
        data = loaded.settings["data"] if task == "lm" else None
    elif (folder / "config.json").is_file() and task == "lm":
        from quintic.lm import load_deepseek

        found = load_deepseek(folder)
        model, weights = found.config, found.state_dict()
    else:
        raise CheckpointError(
            f"{folder} holds neither a run (config.toml) nor a DeepSeek-V3 model (config.json); "
            "give a folder that quintic train or quintic export made"
        )
    return Origin(folder, model, tokenizer if tokenizer.is_file() else None, weights, data)


def _refuse_another(given: str, own: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer that gives a model ids of other text.

    Raises:
        ConfigError: A token of the model's own tokenizer has another id in it, or none.
    """
    from quintic.data.config import OWN_TOKENIZERS

    learned = given in OWN_TOKENIZERS and given != "byte"  # anew, from other text
    if learned or not own.fits(None if given == "byte" else Path(given)):
        raise ConfigError(
            f"data.tokenizer = {given} is not the tokenizer that the model of {folder} was trained with, so its ids "
            "would mean other text: leave data.tokenizer out, or train from scratch without --from"
        )
