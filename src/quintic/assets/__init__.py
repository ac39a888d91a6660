"""Files that come with the package: the embedded corpus and the presets."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from quintic.core import ConfigError, suggest

__all__ = ["corpus_path", "preset_names", "preset_text"]

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
