"""Which task a name stands for, and how its settings, data and model come together.

The command line is the only place that knows the engine *and* the things to be trained. What depends on the task
is in one module per kind of task, with the same functions in each; what does not is here.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from rich.console import Console

from quintic.assets import preset_names, preset_text, weights_names
from quintic.cli.printing import say
from quintic.core import CheckpointError, ConfigError, suggest
from quintic.core.files import check_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quintic.cli import images, language
    from quintic.engine import Run, Settings, Task

    _KINDS: tuple[Kind, ...] = (images, language)  # for the type checker, which sees no import by name

__all__ = [
    "KINDS",
    "Kind",
    "LoadedModel",
    "build_settings",
    "build_task",
    "kind_of",
    "load_run_model",
    "open_run",
    "pick_checkpoint",
    "refuse",
    "refuse_untrained",
    "section_types",
    "shipped_models",
    "split_arguments",
]

KINDS = {"lm": "quintic.cli.language", "tarflow": "quintic.cli.images", "ddpm": "quintic.cli.images"}
"""Task: its module, a :class:`Kind`."""

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*=")  # without a section it is asked for


class Kind(Protocol):
    """What the module of a kind of task has; each function is told the task, since a kind may have several."""

    @property
    def EMBEDDED(self) -> str:
        """Title of the data that comes with the package."""
        ...

    @property
    def READING(self) -> str:
        """What is going on while data is read."""
        ...

    @property
    def OF_FILES(self) -> tuple[str, ...]:
        """Settings that say how files are read."""
        ...

    @property
    def UNIT(self) -> str:
        """Of the loss."""
        ...

    @property
    def NEXT(self) -> str:
        """What one would do with a finished run."""
        ...

    def sections(self, task: str) -> dict[str, type]:
        """The task's own sections."""
        ...

    def prepare(
        self, task: str, paths: Sequence[Path], settings: Settings, progress: Callable[[str], None]
    ) -> tuple[Task, Settings, list[str]]:
        """Read the data; see :func:`build_task`."""
        ...

    def with_shape(self, task: str, settings: Settings) -> Settings:
        """Settings of a model that can be built without data."""
        ...

    def build(self, task: str, settings: Settings) -> nn.Module:
        """The model, uninitialised."""
        ...

    def generate(self, loaded: LoadedModel, folder: Path, options: dict[str, Any]) -> None:
        """Make something and show or write it."""
        ...

    def evaluate(
        self, loaded: LoadedModel, folder: Path, paths: Sequence[Path], split: str, options: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """The loss on a split or on other data: for a person, and for a script."""
        ...


def kind_of(task: str) -> Kind:
    """The module of a task.

    Raises:
        ConfigError: No task has that name.
    """
    if task not in KINDS:
        raise ConfigError(f"unknown task {task!r}{suggest(task, KINDS)}")
    return cast(Kind, import_module(KINDS[task]))


def split_arguments(arguments: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Tell ``section.field=value`` overrides from paths.

    Raises:
        ConfigError: A word with ``=`` that is neither an override nor an existing path, an address on the network, or
            a word that is not UTF-8.
    """
    paths: list[Path] = []
    overrides: list[str] = []
    for argument in map(str, arguments):
        check_name(argument)
        if _OVERRIDE.match(argument) and not Path(argument).exists():
            overrides.append(argument)
        elif "://" in argument and not Path(argument).exists():
            raise ConfigError(f"{argument} is an address, from which nothing is read; save it in a file and name that")
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
    kind = kind_of(task)
    from quintic.engine import EngineConfig
    from quintic.optim import OptimConfig

    return {**kind.sections(task), "optim": OptimConfig, "engine": EngineConfig}


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
        paths: Files and folders; none means the embedded data.
        settings: From :func:`build_settings` or a run's own.
        progress: Told in words what is going on.

    Returns:
        The task, the settings with derived values, and warnings about the data.
    """
    made, settings, warnings = kind_of(task).prepare(task, paths, settings, progress)
    if settings.sources["engine.steps"] != "config.toml" or not settings["engine"].steps:  # a run's own are resolved
        settings = _derive_steps(settings, made.num_examples)
    return made, settings, warnings


def _derive_steps(settings: Settings, num_examples: int) -> Settings:
    engine = settings["engine"]
    if not engine.max_epochs:
        return settings
    limit = max(1, math.ceil(engine.max_epochs * num_examples / engine.batch_size))
    if engine.steps and engine.steps <= limit:
        return settings
    given = [settings.sources[f"engine.{name}"] == "given" for name in ("steps", "max_epochs")]
    if engine.steps and given == [True, False]:
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
    for key, kind in (("task", str), ("paths", list), ("fingerprint", str)):
        if not isinstance(header.get(key), kind):
            raise CheckpointError(f"{run.config_file} is not of a run: it lacks {key!r}; give another folder")
    if odd := [path for path in header["paths"] if not isinstance(path, str)]:
        raise CheckpointError(f"{run.config_file} is damaged: among its 'paths' is {odd[0]!r}")
    settings = Settings.from_toml(run.settings_text(), section_types(header["task"]))
    if header["task"] == "lm":
        from quintic.cli.language import of_run

        settings = of_run(folder, settings)
    return run, settings, header


class LoadedModel(NamedTuple):
    """A model of a run, ready to be used."""

    model: nn.Module
    settings: Settings
    header: dict[str, Any]
    precision: torch.autocast
    """To run it in."""
    shipped: bool = False
    """Whether it came with the package; there is no run then."""
    step: int | None = None
    """Of the checkpoint; None without one."""


def shipped_models() -> list[str]:
    """Names of the models that come with the package, as TASK/NAME.

    Example:
        >>> shipped_models()
        ['ddpm/emoji32', 'ddpm/fashion28', 'tarflow/fashion28']
    """
    return sorted(f"{task}/{name}" for task in KINDS for name in weights_names(task))


def _means_shipped(folder: Path) -> bool:
    """Whether a model of the package is meant, perhaps with a slip: no such folder, and a name like one."""
    if folder.exists():
        return False
    of_a_task = len(folder.parts) == 2 and folder.parts[0] in KINDS
    return of_a_task or bool(difflib.get_close_matches(folder.as_posix(), shipped_models(), n=1))


def _load_shipped(name: str) -> tuple[nn.Module, Settings, dict[str, Any]]:
    """A shipped model, the settings of the preset of its name, which trained it, and the header of a run."""
    if name not in (known := shipped_models()):
        raise CheckpointError(
            f"there is no folder {name}, and no such model comes with the package{suggest(name, known)}"
        )
    task, size = name.split("/")
    from quintic.cli.images import shipped

    settings, model = build_settings(task, size, []), shipped(task, size)  # there are none of language
    values = dict(zip(("channels", "height", "image_width"), model.shape, strict=True), classes=model.num_classes)
    for field, value in values.items():
        settings = settings.derive(f"{task}.{field}", value, f"the weights {name}")
    return model, settings, {"task": task}


def load_run_model(folder: Path, checkpoint: str, device: str, dtype: str | None) -> LoadedModel:
    """The model of a run with the weights of a checkpoint, averaged ones where the run keeps them.

    Args:
        folder: Run folder, or one of :func:`shipped_models` where no such folder is.
        checkpoint: ``best``, ``last`` or a step number.
        device: Where to put the model.
        dtype: Of matrix products; None is the run's own.

    Raises:
        CheckpointError: No usable checkpoint, no such step, or one of other settings.
    """
    import torch

    from quintic.core.machine import autocast, pick_device, pick_dtype
    from quintic.engine.checkpoint import check_fit, files_of, load_model, load_weights
    from quintic.engine.pieces import Stored

    run = path = None
    if shipped := _means_shipped(folder):
        model, settings, header = _load_shipped(folder.as_posix())
    else:
        run, settings, header = open_run(folder)
        path = pick_checkpoint(run, checkpoint)
        build = partial(kind_of(header["task"]).build, header["task"], settings)
        stored = Stored([run.initial] if path is None else files_of(path, "model"))
        with torch.device("meta"):  # takes no memory, of which changed settings may ask any amount
            check_fit(stored.shapes, build(), f"{path or run.initial}, by the settings of {run.config_file},")
        model = build()
    where = pick_device(device)
    model.to(where)
    precision = pick_dtype(dtype or settings["engine"].dtype, where)
    if precision == torch.float64:
        model.double()
    if path is not None:
        load_model(path, model, averaged=True)
    elif run is not None:
        load_weights([run.initial], model)
    step = None if path is None else int(path.name.rpartition("-")[2])
    return LoadedModel(model.eval(), settings, header, autocast(where, precision), shipped, step)


def refuse(options: dict[str, Any], task: str) -> None:
    """Refuse options that a verb takes and a task has no use for.

    Raises:
        ConfigError: There are any.
    """
    for name in options:
        shown = "class" if name == "label" else name.replace("_", "-")
        raise ConfigError(
            f"--{shown} has no meaning for a run of task {task}; leave it out, or see --help for what it belongs to"
        )


def refuse_untrained(folder: Path, header: dict[str, Any]) -> None:
    """Refuse to go on with the training of a model that was not trained in this folder.

    Raises:
        CheckpointError: It was imported or compressed.
    """
    if (made := header.get("size")) in ("imported", "compressed"):
        raise CheckpointError(
            f"{folder} was {made}, not trained; train it further with: quintic train TEXT --from {folder}"
        )


def pick_checkpoint(run: Run, wanted: str) -> Path | None:
    """The checkpoint that was asked for; None if there is none but weights to start from.

    Args:
        run: The run.
        wanted: ``best``, ``last`` or a step number.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    from quintic.engine.checkpoint import list_checkpoints, usable_checkpoint, verify_checkpoint

    saved = list_checkpoints(run.checkpoints)
    if wanted in ("best", "last"):
        path = usable_checkpoint(run.checkpoints, _warn, run.best_step() if wanted == "best" else None)
        if path is None and not run.initial.exists():
            raise CheckpointError(
                f"{run.folder} has no checkpoint yet; train further with: quintic resume {run.folder}"
            )
        return path
    if wanted.isdigit() and int(wanted) in saved:
        verify_checkpoint(saved[int(wanted)])
        return saved[int(wanted)]
    steps = ", ".join(map(str, saved)) or "none"
    raise CheckpointError(f"no checkpoint {wanted!r}; expected best, last or one of the saved steps: {steps}")


def _warn(text: str) -> None:
    say(f"warning: {text}", console=Console(stderr=True), style="yellow")
