"""The texts of JSON files: one object a line (JSON lines), or an array of objects.

A text is a field of each object, or several in a text of one's own. A conversation is a field too: a list of messages
``{"role": ..., "content": ...}``, or ``{"from": ..., "value": ...}``, which becomes paragraphs ``role: content``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quintic.core import DataError

__all__ = ["json_file", "json_lines"]

_BRACED = re.compile(r"\{([^{}]+)\}")
"""A field within a text."""
_MESSAGE = (("role", "content"), ("from", "value"))
"""Who speaks and what, of a message."""
_REFUSED = (ValueError, RecursionError)
"""What the parser says of text that is no JSON, of a number of thousands of digits, of brackets within brackets."""


def json_lines(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    """The text of every line, empty lines aside.

    Args:
        path: For messages.
        lines: JSON objects with the field, or strings.
        field: Name of a field, or a text with names between braces.

    Raises:
        DataError: A line is no JSON or lacks the text; the message names the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except _REFUSED as error:
            raise DataError(
                f"{path}:{number}: not JSON ({_why(error)}); .jsonl needs one JSON object a line"
            ) from error
        yield _text(f"{path}:{number}", value, field)


def json_file(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    """The texts of a file that holds an array of objects or of strings, or one of them a line.

    Args:
        path: For messages.
        lines: Its lines.
        field: As for :func:`json_lines`.

    Raises:
        DataError: It holds something else; the message names the entry.
    """
    rest = itertools.dropwhile(lambda line: not line.strip(), lines)
    first = next(rest, "")
    if not first.lstrip().startswith("["):
        try:
            json.loads(first or "0")
        except _REFUSED as error:
            raise DataError(
                f"{path} is neither an array of JSON objects nor one object a line; to read it as plain text, "
                "name it .txt"
            ) from error
        yield from json_lines(path, itertools.chain([first], rest), field)
        return
    try:
        entries = json.loads("".join([first, *rest]))
    except _REFUSED as error:
        line = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}: not JSON ({_why(error)}{line})") from error
    for number, entry in enumerate(entries):
        yield _text(f"{path}[{number}]", entry, field)


def _why(error: Exception) -> str:
    """What is wrong with it."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "brackets within brackets" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _text(place: str, value: object, field: str) -> str:
    """The text of an entry."""
    if isinstance(value, str):
        return _whole(place, "the text", value)
    parts = _BRACED.split(field) if _BRACED.search(field) else ["", field, ""]  # text and names in turn
    between, names = parts[::2], parts[1::2]
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object with a field {names[0]!r}, found {json.dumps(value)[:40]!r}")
    texts = [_field(place, value, name) for name in names]
    return between[0] + "".join(text + after for text, after in zip(texts, between[1:], strict=True))


def _field(place: str, value: dict[str, Any], name: str) -> str:
    """The text in a field of an entry."""
    if name not in value:
        fit = [key for key, entry in value.items() if isinstance(entry, str) or _conversation(entry) is not None]
        advice = f"; choose one with data.field={fit[0]}" if fit else ""
        fields = ", ".join(map(repr, value))
        raise DataError(f"{place}: no field {name!r}; the fields are {fields}{advice}")
    text = value[name]
    if not isinstance(text, str):
        text = _conversation(text)
    if text is None:
        raise DataError(
            f"{place}: field {name!r} is not text but {type(value[name]).__name__}; expected a string, or a list of "
            'messages like {"role": "user", "content": "..."}'
        )
    return _whole(place, f"field {name!r}", text)


def _conversation(entry: object) -> str | None:
    """A list of messages as paragraphs; None if it is something else."""
    if not isinstance(entry, list) or not entry:
        return None
    paragraphs = []
    for message in entry:
        if not isinstance(message, dict):
            return None
        pairs = [(message.get(who), message.get(what)) for who, what in _MESSAGE if what in message]
        if not pairs or not all(isinstance(word, str) for word in pairs[0]):
            return None
        paragraphs.append(f"{pairs[0][0]}: {pairs[0][1]}")
    return "\n\n".join(paragraphs)


def _whole(place: str, what: str, text: str) -> str:
    """The text, unless an escape in it is half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {what} has half of a surrogate pair (\\u{ord(text[error.start]):04x} "
            f"at character {error.start}), which is no text; mend or delete it"
        ) from error
    return text
