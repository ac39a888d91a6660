"""Where metrics go besides ``metrics.jsonl``: TensorBoard, trackio or Weights & Biases.

The file stays the truth. A sink gets the same numbers after they are written there, those of a list under
``name/0``, ``name/1`` ...; tables (the load of every expert, spectra) stay in the file, where the report finds them.
A sink that fails is told of once and left alone: it never stops training.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quintic.core import ConfigError, MissingExtraError, suggest
from quintic.engine.run import Run

__all__ = ["SINKS", "Sink", "check_sink", "open_sink", "scalars"]

SINKS = ("tensorboard", "trackio", "wandb")
"""Each is also the name of its package and of its extra."""

_PROJECT = "quintic"


class Sink(Protocol):
    """A place for metrics."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take the metrics of one step."""
        ...

    def close(self) -> None:
        """All steps are told."""
        ...


def check_sink(name: str) -> None:
    """Make sure that a sink can be had, before anything expensive is done.

    Raises:
        ConfigError: There is no such sink.
        MissingExtraError: Its package is not installed.
    """
    if name not in SINKS:
        raise ConfigError(f"unknown sink {name!r}{suggest(name, SINKS)}")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise MissingExtraError(name, name)


def open_sink(name: str, run: Run, step: int, warn: Callable[[str], None]) -> Sink:
    """A sink that cannot stop training.

    Args:
        name: One of :data:`SINKS`.
        run: The run that is told about; TensorBoard's files go into its folder.
        step: Steps taken already; what the sink knows of later ones is void.
        warn: Told once if the sink fails.

    Raises:
        ConfigError: There is no such sink.
        MissingExtraError: Its package is not installed.
    """
    check_sink(name)
    return _Harmless(
        name, lambda: _TensorBoard(run.folder, step) if name == "tensorboard" else _Hosted(name, run), warn
    )


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step: single ones, and lists of numbers one by one.

    Example:
        >>> scalars({"step": 3, "loss": 2.5, "max_vio": [0.5, 0.25], "mfu": None, "load": [[1.0]], "note": "x"})
        {'loss': 2.5, 'max_vio/0': 0.5, 'max_vio/1': 0.25}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if name == "step":
            continue
        if isinstance(value, list | tuple):
            found |= {f"{name}/{i}": each for i, each in enumerate(value) if _is_number(each)}
        elif _is_number(value):
            found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Harmless:
    """A sink whose first failure is its last word."""

    def __init__(self, name: str, make: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._sink: Sink | None = None
        self._sink = self._try(make)

    def write(self, row: Mapping[str, Any]) -> None:
        if (sink := self._sink) is not None:
            self._try(lambda: sink.write(row))

    def close(self) -> None:
        if (sink := self._sink) is not None:
            self._try(sink.close)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a foreign package raises
            self._sink = None
            self._warn(f"{self._name} failed ({error}) and gets no more metrics; metrics.jsonl has them all")
            return None


class _TensorBoard:
    """Event files in RUN/tensorboard; look at them with ``tensorboard --logdir RUN``."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """wandb or trackio, which have one interface. A resumed run goes on under the name it had."""

    def __init__(self, name: str, run: Run) -> None:
        self._api = importlib.import_module(name)
        known = f"{run.folder.absolute().name}-{_identity(run)}"
        self._api.init(
            project=_PROJECT,
            name=known,
            config=run.header(),
            resume="allow",
            **({"id": known, "dir": str(run.folder)} if name == "wandb" else {}),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._api.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._api.finish()


def _identity(run: Run) -> str:
    """Tells this run from others of its folder's name; made once and kept in ``run.json``."""
    if (known := run.facts().get("log_id")) is not None:
        return known
    made = secrets.token_hex(4)
    run.record(log_id=made)
    return made
