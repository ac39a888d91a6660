"""Classes of a run by name: which one is asked for, and which one each picture has."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.core import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from quintic.cli.wiring import LoadedModel
    from quintic.data.images import ImageData, ImageSplit

__all__ = ["class_names", "class_number", "give_classes"]


def class_names(loaded: LoadedModel, folder: Path) -> list[str]:
    """Names of the classes that a run has learned, in order; none of a model that comes with the package."""
    from quintic.engine import Run

    return [] if loaded.shipped else Run(folder).facts().get("data", {}).get("classes", [])


def class_number(label: str, classes: int, names: Sequence[str]) -> int:
    """Number of a class that was given by its name or number; -1 is none.

    Raises:
        ConfigError: There is no such class.
    """
    if not classes:
        raise ConfigError("--class needs a model with classes; this one was trained without")
    if label in names:
        return names.index(label)
    with contextlib.suppress(ValueError):
        if -1 <= (number := int(label)) < classes:
            return number
    raise ConfigError(
        f"--class must be {'a name or ' if names else ''}0 to {classes - 1}, or -1 for none, found {label}"
        f"{suggest(label, names)}"
    )


def give_classes(images: ImageData, config: Any, names: Sequence[str], label: str | None) -> tuple[ImageData, str]:
    """Test images with the classes that a model knows them by, whatever numbers they were read with.

    Args:
        images: As they were read.
        config: Of the model, with ``classes`` and ``class_dropout``.
        names: Of the model's classes, if they have any.
        label: Class of all, by name or number; None takes the folders that the pictures are in.

    Returns:
        The images, with labels or without, and how to say so behind "3 images".

    Raises:
        ConfigError: There is no such class.
        DataError: A folder has the name of no class, or the model cannot do without a class.
    """
    import numpy as np

    split = images.test
    labels = None
    if label is not None:
        number = class_number(label, config.classes, names)
        if number >= 0:
            labels = np.full(len(split), number)
        words = f", all given the class {names[number] if names else number}" if number >= 0 else ", without a class"
    elif not config.classes:
        words = ""
    else:
        known = list(names) or [str(number) for number in range(config.classes)]
        found = _folders(split, images.class_names, known)
        unknown = sorted(set(found) - set(known))
        if unknown and names:
            some = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
            raise DataError(
                f"the model knows no class {some}; it knows: {', '.join(known)}. Rename the folders, or say what all "
                "pictures are: --class NAME, or --class -1 for none"
            )
        if found and not unknown:
            labels = np.array([known.index(name) for name in found], dtype=np.int64)
            words = f", each given its class ({len(set(found))} of {config.classes})"
        else:
            why = "those of the model have no names, but numbers" if unknown else "they are in no folders of classes"
            words = f", without a class ({why})"
    if labels is None and config.classes and not config.class_dropout:
        raise DataError(
            "the model has seen no image without its class (class_dropout=0), and these have none that it knows; say "
            "what all of them are: --class NAME"
        )
    known_names = tuple(names) or tuple(str(number) for number in range(config.classes))
    return replace(images, test=replace(split, labels=labels), class_names=known_names), words


def _folders(split: ImageSplit, read: Sequence[str], known: Sequence[str]) -> list[str]:
    """Name of the class of each picture by its folder; none if they are in none.

    A named folder that has no subfolders may be a class itself, such as pictures/cats.
    """
    if split.labels is not None:
        return [read[int(number)] for number in split.labels]
    inside = [Path(file).absolute().parent.name for file in split.files]
    return inside if set(inside) <= set(known) else []
