"""The files beside a ``tokenizer.json`` of Hugging Face: which tokens begin and end a text, templates of chats.

They are read for the tokens and otherwise kept as they are, so that a model that comes from a folder and goes into one
speaks there as before. Templates are text here; nothing runs them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quintic.core import DataError

__all__ = ["BESIDE", "Declared", "declared", "for_context"]

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that go where ``tokenizer.json`` goes."""


@dataclass(frozen=True)
class Declared:
    """What a folder says of its tokenizer; empty where it says nothing."""

    end: str = ""
    """Token that ends a text."""
    begin: str = ""
    """Token that stands before every text."""
    stops: tuple[int, ...] = ()
    """Ids at which a generated text is over."""
    source: str = ""
    """The file that says the end."""
    files: Mapping[str, str] = field(default_factory=dict)
    """{name: content} of those in :data:`BESIDE`."""


def declared(folder: Path, special: Callable[[int], str | None]) -> Declared:
    """Read what a folder says.

    ``tokenizer_config.json`` comes before ``special_tokens_map.json``. Where neither names the end, the ids in
    ``generation_config.json`` and ``config.json`` count, if they are special tokens: that of a configuration may be its
    class's default.

    Args:
        folder: Where ``tokenizer.json`` is.
        special: The special token with an id, None if that is none.

    Raises:
        DataError: A file is damaged; the message names it.
    """
    files = {name: _text(folder / name) for name in BESIDE if os.path.isfile(folder / name)}
    tables = {name: _table(folder / name, text) for name, text in files.items() if name.endswith(".json")}
    by_name = [name for name in ("tokenizer_config.json", "special_tokens_map.json") if name in tables]
    end = begin = source = ""
    for name in reversed(by_name):
        end, source = (_token(tables[name], "eos_token"), name) if tables[name].get("eos_token") else (end, source)
        begin = _token(tables[name], "bos_token") if "bos_token" in tables[name] else begin
    if tables.get("tokenizer_config.json", {}).get("add_bos_token") is False:
        begin = ""
    for name in ("generation_config.json", "config.json"):
        if end or not os.path.isfile(path := folder / name):
            continue
        table = tables.get(name) or _table(path, _text(path))
        known = [token for number in _ids(table) if (token := special(number)) is not None]
        end, source = (known[0], name) if known else ("", "")
    return Declared(end, begin, _ids(tables.get("generation_config.json", {})), source, files)


def for_context(files: Mapping[str, str], context: int) -> dict[str, str]:
    """The files as they go into a folder of a model that has learned on: only what the model changed is another.

    Args:
        files: {name: content}.
        context: The model's longest sequence.
    """
    found = dict(files)
    if "tokenizer_config.json" not in found:
        return found
    table = json.loads(found["tokenizer_config.json"])
    changes: dict[str, Any] = {}
    longest = table.get("model_max_length")
    if isinstance(longest, int | float) and longest > context:
        changes["model_max_length"] = context
    if "auto_map" in table:  # names Python files, which are not taken along; tokenizer.json says all that they do
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    if changes:
        table = {name: value for name, value in table.items() if name != "auto_map"} | changes
        found["tokenizer_config.json"] = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; mend or delete it") from error


def _table(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; mend or delete it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}, expected a JSON object; mend or delete it")
    return found


def _token(table: Mapping[str, Any], name: str) -> str:
    """A token by name: its text, or an object that has it."""
    value = table.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _ids(table: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: one or a list."""
    value = table.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int and 0 <= number < 1 << 32)
