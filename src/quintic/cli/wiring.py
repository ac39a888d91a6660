"""Which task a name stands for, and how its settings, data and model come together.

The command line is the only place that knows the engine *and* the things to be trained.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quintic.assets import preset_names, preset_text
from quintic.cli.printing import say
from quintic.core import CheckpointError, ConfigError, DataError, suggest

if TYPE_CHECKING:
    import torch

    from quintic.data.tokenizer import Tokenizer
    from quintic.engine import Run, Settings, Task
    from quintic.lm import LanguageModel

__all__ = [
    "TASKS",
    "build_settings",
    "build_task",
    "evaluate_run",
    "load_run_model",
    "open_run",
    "section_types",
    "split_arguments",
]

TASKS = ("lm",)

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+=")


def split_arguments(arguments: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Tell ``section.field=value`` overrides from paths.

    Raises:
        ConfigError: A word with ``=`` that is neither an override nor an existing path.
    """
    paths: list[Path] = []
    overrides: list[str] = []
    for argument in arguments:
        if _OVERRIDE.match(argument) and not Path(argument).exists():
            overrides.append(argument)
        elif "=" in argument and not Path(argument).exists():
            raise ConfigError(f"'{argument}' is not a setting; write section.field=value, for example optim.lr=0.01")
        else:
            paths.append(Path(argument))
    return paths, overrides


def section_types(task: str) -> dict[str, type]:
    """The dataclass of every section of a task's settings.

    Raises:
        ConfigError: No task has that name.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}{suggest(task, TASKS)}")
    from quintic.data import DataConfig
    from quintic.engine import EngineConfig
    from quintic.lm import LMConfig
    from quintic.optim import OptimConfig

    return {"lm": LMConfig, "data": DataConfig, "optim": OptimConfig, "engine": EngineConfig}


def build_settings(task: str, size: str, overrides: Sequence[str]) -> Settings:
    """Preset and overrides.

    Raises:
        ConfigError: Unknown task, size or setting, or a bad value.
    """
    from quintic.engine import Settings

    types = section_types(task)
    if size not in preset_names(task):
        raise ConfigError(f"unknown size {size!r} for task {task}{suggest(size, preset_names(task))}")
    return Settings.build(types, tomllib.loads(preset_text(task, size)), size, overrides)


def build_task(
    task: str, paths: Sequence[Path], settings: Settings, progress: Callable[[str], None] = lambda _: None
) -> tuple[Task, Settings, list[str]]:
    """Prepare the data, derive what follows from it, and make the task.

    Args:
        task: Its name.
        paths: Files and folders; none means the embedded corpus.
        settings: From :func:`build_settings` or a run's own.
        progress: Told in words what is going on.

    Returns:
        The task, the settings with derived values, and warnings about the data.
    """
    from quintic.data import prepare
    from quintic.lm.task import LanguageModelTask, derived_fields

    data = prepare(list(paths) or None, settings["data"], progress)
    given = settings.sources["lm.vocab_size"] == "given"
    if given and settings["lm"].vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(
            f"lm.vocab_size = {settings['lm'].vocab_size} is below the tokenizer's {data.tokenizer.vocab_size} tokens; "
            f"leave it out, or train a smaller tokenizer with data.vocab_size={settings['lm'].vocab_size}"
        )
    if settings.sources["engine.steps"] != "config.toml":  # a run's own settings are resolved already
        for name, (value, why) in derived_fields(settings["lm"], data.tokenizer).items():
            if not (name == "vocab_size" and given):
                settings = settings.derive(f"lm.{name}", value, why)
    made = LanguageModelTask(settings["lm"], data, cross_documents=settings["data"].cross_documents)
    if settings.sources["engine.steps"] != "config.toml":
        settings = _derive_steps(settings, made.num_examples)
    return made, settings, data.warnings


def _derive_steps(settings: Settings, num_examples: int) -> Settings:
    engine = settings["engine"]
    if not engine.max_epochs:
        return settings
    limit = max(1, math.ceil(engine.max_epochs * num_examples / engine.batch_size))
    if engine.steps and engine.steps <= limit:
        return settings
    if settings.sources["engine.steps"] == "given" and settings.sources["engine.max_epochs"] != "given":
        return settings  # who asks for a number of steps gets it
    why = f"{engine.max_epochs:g} epochs of {num_examples} windows, {engine.batch_size} a step"
    return settings.derive("engine.steps", limit, why)


def open_run(folder: Path) -> tuple[Run, Settings, dict[str, Any]]:
    """An existing run, its settings and the header of its configuration.

    Raises:
        CheckpointError: The folder holds no run, or its configuration is damaged.
    """
    from quintic.engine import Run, Settings

    run = Run.open(folder)
    header = run.header()
    settings = Settings.from_toml(run.settings_text(), section_types(header.get("task", "lm")))
    return run, settings, header


def load_run_model(
    folder: Path, checkpoint: str, device: str, dtype: str | None
) -> tuple[LanguageModel, Tokenizer, torch.autocast]:
    """The model of a run with the weights of a checkpoint, its tokenizer, and the precision to run it in.

    Args:
        folder: Run folder.
        checkpoint: ``best``, ``last`` or a step number.
        device: Where to put the model.
        dtype: Of matrix products; None is the run's own.

    Raises:
        CheckpointError: No usable checkpoint, or no such step.
    """
    import torch

    from quintic.core.machine import autocast, pick_device, pick_dtype
    from quintic.data.tokenizer import Tokenizer
    from quintic.engine.checkpoint import list_checkpoints, load_model, usable_checkpoint, verify_checkpoint
    from quintic.lm import LanguageModel

    run, settings, _ = open_run(folder)
    saved = list_checkpoints(run.checkpoints)
    if checkpoint in ("best", "last"):
        path = usable_checkpoint(run.checkpoints, _warn, run.best_step() if checkpoint == "best" else None)
        if path is None:
            raise CheckpointError(f"{folder} has no checkpoint yet; train further with: quintic resume {folder}")
    elif checkpoint.isdigit() and int(checkpoint) in saved:
        path = saved[int(checkpoint)]
        verify_checkpoint(path)
    else:
        steps = ", ".join(map(str, saved)) or "none"
        raise CheckpointError(f"no checkpoint {checkpoint!r}; expected best, last or one of the saved steps: {steps}")
    where = pick_device(device)
    model = LanguageModel(settings["lm"], seed=None).to(where)
    precision = pick_dtype(dtype or settings["engine"].dtype, where)
    if precision == torch.float64:
        model.double()
    load_model(path, model)
    return model.eval(), Tokenizer.load(folder / "tokenizer.json"), autocast(where, precision)


def evaluate_run(
    folder: Path, paths: Sequence[Path], split: str, checkpoint: str, device: str, dtype: str | None
) -> tuple[dict[str, float], str]:
    """Losses of a run on a split of its own data or on other text, and what was evaluated, in words."""
    from dataclasses import replace

    from quintic.data import prepare
    from quintic.lm.task import LanguageModelTask

    if split not in ("test", "validation"):
        raise ConfigError(f"unknown split {split!r}{suggest(split, ['test', 'validation'])}")
    model, _, precision = load_run_model(folder, checkpoint, device, dtype)
    _, settings, header = open_run(folder)
    if paths:
        whole = replace(
            settings["data"], tokenizer=str(folder / "tokenizer.json"), validation_fraction=0.0, test_fraction=1.0
        )
        data, what = prepare(list(paths), whole), ", ".join(map(str, paths))
        split = "test"
    else:
        data = prepare([Path(path) for path in header["paths"]] or None, settings["data"])
        what = f"{split} split of {folder}"
    task = LanguageModelTask(settings["lm"], data, cross_documents=settings["data"].cross_documents)
    if not paths and task.fingerprint != header["fingerprint"]:
        raise DataError(f"the data of {folder} has changed since it was trained; name the text to evaluate on instead")
    with precision:
        values = task.evaluate(model, split)
    assert values is not None
    return values, what


def _warn(text: str) -> None:
    say(f"warning: {text}", console=Console(stderr=True), style="yellow")
