"""Writing tensors: what goes wrong with the disk is an ``OSError``, as for any other file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["save_tensors"]

_ERRNO = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+),")
"""In the words of the library from version 0.6 on, and of earlier ones."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Args:
        tensors: Contiguous, none of which shares memory with another.
        path: The file.
        metadata: Words for its header.

    Raises:
        OSError: The disk is full or the like; the library's own error has the number in its text.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if found := _ERRNO.search(str(error)):
            number = int(found[1] or found[2])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
