"""Models of trained runs, for programs: what ``quintic generate`` and ``evaluate`` load, in Python."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quintic.data import Tokenizer
    from quintic.engine import Settings

__all__ = ["LoadedRun", "load_run"]


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it."""

    model: torch.nn.Module
    """In evaluation mode: a :class:`~quintic.lm.LanguageModel`, :class:`~quintic.flow.TarFlow` or
    :class:`~quintic.diffusion.UNet`."""
    task: str
    """``lm``, ``tarflow`` or ``ddpm``."""
    settings: Settings
    """Of the run: ``settings["engine"].steps`` and so on."""
    tokenizer: Tokenizer | None
    """Of a language model."""
    classes: tuple[str, ...]
    """Names of the classes of pictures, in the order of their labels; empty if there are none."""


def load_run(
    folder: str | os.PathLike[str], checkpoint: str = "best", *, device: str = "auto", dtype: str | None = None
) -> LoadedRun:
    """The model of a run folder with the weights of a checkpoint, averaged ones where the run keeps them.

    Args:
        folder: What ``quintic train`` or ``quintic import`` made; or the name of a model that comes with the package,
            such as ``tarflow/fashion28``.
        checkpoint: ``best`` (lowest validation loss), ``last`` or a step number.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: ``float64`` for weights in double precision; they are float32 otherwise. None is the run's own.

    Raises:
        CheckpointError: There is no run, no such checkpoint, or a damaged one.

    Example:
        >>> found = load_run("tarflow/fashion28", device="cpu")
        >>> found.task, found.model.shape, found.classes
        ('tarflow', (1, 28, 28), ())
    """
    from quintic.cli.language import own_tokenizer
    from quintic.cli.wiring import load_run_model
    from quintic.engine import Run

    path = Path(folder)
    loaded = load_run_model(path, checkpoint, device, dtype)
    task = loaded.header["task"]
    facts: dict[str, Any] = {} if loaded.shipped else Run(path).facts()
    tokenizer = own_tokenizer(path, loaded.settings) if task == "lm" else None
    classes = tuple(facts.get("data", {}).get("classes", ()))
    return LoadedRun(loaded.model, task, loaded.settings, tokenizer, classes)
