"""Where a command writes: nothing is replaced unless that is asked for, and names that nobody chose are free ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from quintic.core import ConfigError

__all__ = ["output_path"]


def output_path(out: Path | None, default: Path, overwrite: bool, beside: tuple[str, ...] = ()) -> Path:
    """Where to write.

    Args:
        out: The name that was asked for.
        default: The name without one; ``NAME-2``, ``NAME-3`` and so on if it is taken and not to be replaced.
        overwrite: Whether what exists is replaced.
        beside: Endings of further files of that name.

    Raises:
        ConfigError: The name that was asked for, or that of a file beside it, is taken.
    """

    def taken(path: Path) -> Path | None:
        every = [path, *(path.with_suffix(suffix) for suffix in beside)]
        return next((each for each in every if os.path.lexists(each)), None)

    if overwrite:
        return out or default
    if out is not None:
        if there := taken(out):
            raise ConfigError(f"{there} exists; --overwrite replaces it")
        return out
    names = itertools.chain([default], (default.with_stem(f"{default.stem}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not taken(name))
