"""Files that come with the package: the embedded corpus, the presets, and weights of trained models."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from quintic.core import ConfigError, suggest

__all__ = ["corpus_path", "preset_names", "preset_text", "weights_names", "weights_path"]

_HERE = Path(str(files(__name__)))


def corpus_path() -> Path:
    """The embedded corpus: *Moby Dick* as UTF-8 text (CC0; see ``corpus/README.md``)."""
    return _HERE / "corpus" / "moby_dick.txt"


def preset_names(task: str) -> list[str]:
    """Names of the presets of a task.

    Example:
        >>> "laptop" in preset_names("lm")
        True
    """
    return sorted(path.stem for path in (_HERE / "presets" / task).glob("*.toml"))


def preset_text(task: str, size: str) -> str:
    """TOML of a preset.

    Raises:
        ConfigError: No preset has that name.
    """
    if size not in (known := preset_names(task)):
        raise ConfigError(f"unknown size {size!r} for task {task!r}{suggest(size, known)}")
    return (_HERE / "presets" / task / f"{size}.toml").read_text(encoding="utf-8")


def weights_names(task: str) -> list[str]:
    """Names of the trained models of a task; each has a card beside it, ``NAME.md``.

    Example:
        >>> weights_names("ddpm")
        ['emoji32', 'fashion28']
    """
    return sorted(path.stem for path in (_HERE / "weights" / task).glob("*.safetensors"))


def weights_path(task: str, name: str) -> Path:
    """File of a trained model.

    Raises:
        ConfigError: No model has that name.
    """
    if name not in (known := weights_names(task)):
        raise ConfigError(f"no model {name!r} of task {task} comes with the package{suggest(name, known)}")
    return _HERE / "weights" / task / f"{name}.safetensors"
