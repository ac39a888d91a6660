"""What every section of settings checks of its values: types, names and lower bounds, in the same words.

Sections are frozen dataclasses that a person may also make in Python, where nothing has read their values before. What
a section has of its own beyond these, it checks itself.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from quintic.core.errors import ConfigError, suggest

__all__ = ["check_counts", "check_least", "check_names", "check_types"]

_ACCEPTED = {"bool": bool, "int": Integral, "float": Real, "str": str}


def check_types(section: str, values: Any) -> None:
    """Make sure that every field has the type of its annotation; a whole number is a float too, a bool is no number.

    Args:
        section: What the settings are called by, as in ``section.field=value``.
        values: A dataclass whose fields are bool, int, float or str.

    Raises:
        ConfigError: One has another.

    Example:
        >>> @dataclasses.dataclass
        ... class Sizes:
        ...     width: int = 8
        >>> check_types("model", Sizes(width=8.5))
        Traceback (most recent call last):
        quintic.core.errors.ConfigError: setting 'model.width' must be of type int, found 8.5
    """
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        wanted: str = field.type if isinstance(field.type, str) else field.type.__name__
        if not isinstance(value, _ACCEPTED[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            kind = "bool (true or false)" if wanted == "bool" else wanted
            raise ConfigError(f"setting '{section}.{field.name}' must be of type {kind}, found {value!r}")


def check_names(section: str, values: Any, known: Mapping[str, Collection[str]]) -> None:
    """Make sure that fields have one of the names that are known: {field: names}.

    Raises:
        ConfigError: One has another, to which the closest is suggested.
    """
    for field, names in known.items():
        if (value := getattr(values, field)) not in names:
            raise ConfigError(f"{section}.{field} = {value!r} is unknown{suggest(value, names)}")


def check_least(section: str, values: Any, least: Mapping[str, float]) -> None:
    """Make sure that fields are finite numbers, and at least what is given for them: {field: number}.

    Raises:
        ConfigError: One is less, infinite or not a number.
    """
    for field, bound in least.items():
        value = getattr(values, field)
        if not bound <= value < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise ConfigError(f"{section}.{field} must be at least {bound}{finite}, found {value}")


def check_counts(least: int = 1, **counts: Any) -> None:
    """Make sure that arguments of a function are whole numbers, and at least so large: name=value.

    Raises:
        ConfigError: One is not.

    Example:
        >>> check_counts(samples=2, batch=-1)
        Traceback (most recent call last):
        quintic.core.errors.ConfigError: batch = -1; expected a whole number, 1 or more
    """
    for name, value in counts.items():
        try:
            fits = operator.index(value) >= least
        except TypeError:
            fits = False
        if not fits:
            raise ConfigError(f"{name} = {value!r}; expected a whole number, {least} or more")
