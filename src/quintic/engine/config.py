"""Settings: dataclasses, presets in TOML, overrides by dotted name, and where every value came from.

A run has sections (``engine``, ``optim``, ``data`` and the task's own, such as ``lm``), each a frozen dataclass
that lives beside the code it configures. A value comes from the dataclass (default), a preset, an override
``section.field=value`` or a derivation, the later winning; its source is kept and written beside it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quintic.core import ConfigError
from quintic.core.settings import check_least, check_names, check_types
from quintic.engine.setting_names import did_you_mean

__all__ = ["EngineConfig", "Settings", "field_help", "known_settings"]


@dataclass(frozen=True)
class EngineConfig:
    """How a run goes, whatever is trained.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    steps: int = 200
    """Optimizer steps; 0 means as many as max_epochs allows."""
    max_epochs: float = 0.0
    """Upper bound of passes over the training data, lowering steps on a small corpus; 0 is no bound."""
    batch_size: int = 16
    """Examples per optimizer step, over all ranks."""
    micro_batch_size: int = 0
    """Examples per forward pass of one rank; 0 takes all it has. Smaller saves memory and gives the same step."""
    shards: int = 0
    """Ranks of a torchrun job that hold one copy of weights and optimizer state together; 0 is all of them."""
    reshard: bool = True
    """Whether gathered blocks are put away between forward and backward; false keeps them: less traffic, as ZeRO-1."""
    seed: int = 0
    """Initial weights, data order and samples are pure functions of it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Of matrix products: auto (float32 on CPUs), float32, bfloat16 (weights stay float32), float64 (weights too)."""
    eval_every: int = 100
    """Steps between validations; 0 validates at the end only."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 saves at the end only. What validates better than all before is saved too."""
    sample_every: int = 0
    """Steps between samples; 0 samples at the end only."""
    keep_last: int = 2
    """Newest checkpoints kept, at least 1; the one with the lowest validation loss is kept besides."""
    keep_stable: bool = True
    """Whether wsd's last checkpoint before the rate falls is made and kept; ``resume --steps`` goes on from it."""
    background_save: bool = False
    """Whether training goes on while a checkpoint is written, from a copy of the state in memory."""
    load_every: int = 10
    """Steps between records of the load of every expert."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are validated, sampled and used; 0 keeps and uses the last ones."""
    on_nonfinite: str = "stop"
    """What a loss or gradient that is not finite does: stop, or skip the step and record its examples."""
    max_skips: int = 5
    """Steps skipped in a row after which the run stops all the same."""
    diagnose_every: int = 100
    """Steps between diagnoses of the optimizer's step (spectra, predicted loss change); 0 is never."""

    def __post_init__(self) -> None:
        check_types("engine", self)
        check_names("engine", self, {"on_nonfinite": ("stop", "skip")})
        check_least("engine", self, {
            "steps": 0, "max_epochs": 0, "batch_size": 1, "micro_batch_size": 0, "shards": 0, "eval_every": 0,
            "checkpoint_every": 0, "sample_every": 0, "keep_last": 1, "load_every": 1, "diagnose_every": 0,
            "ema_decay": 0, "max_skips": 0,
        })  # fmt: skip
        if self.ema_decay >= 1:
            raise ConfigError(f"engine.ema_decay must be below 1, found {self.ema_decay}")
        if self.steps == 0 and self.max_epochs == 0:
            raise ConfigError("engine.steps and engine.max_epochs are both 0: set one, e.g. engine.steps=1000")


@dataclass(frozen=True)
class Settings:
    """All sections of a run, and the source of each value.

    Args:
        sections: {section name: frozen dataclass}.
        sources: {"section.field": words}.
    """

    sections: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        types_by_section: Mapping[str, type],
        preset: Mapping[str, Mapping[str, Any]],
        preset_name: str,
        overrides: Iterable[str],
    ) -> Settings:
        """Defaults, then a preset, then overrides.

        Args:
            types_by_section: {section: dataclass}.
            preset: Parsed TOML of a preset.
            preset_name: For the record.
            overrides: ``section.field=value`` strings, value in TOML syntax or a bare word.

        Raises:
            ConfigError: Unknown section or field, wrong type, value out of range.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        known = known_settings(types_by_section)
        for section, table in preset.items():
            for name, value in table.items():
                key = f"{section}.{name}"
                values[key] = _typed(key, value, known)
                sources[key] = f"preset {preset_name}"
        for override in overrides:
            key, _, text = override.partition("=")
            values[key] = _typed(key, text, known, from_text=True)
            sources[key] = "given"
        sections = {}
        for section, kind in types_by_section.items():
            own = {f.name: values[key] for f in dataclasses.fields(kind) if (key := f"{section}.{f.name}") in values}
            sections[section] = kind(**own)
        return cls(sections, {key: sources.get(key, "default") for key in known})

    def __getitem__(self, section: str) -> Any:
        return self.sections[section]

    def override(self, overrides: Iterable[str]) -> Settings:
        """A copy with some values given anew, as :meth:`build` takes them.

        Raises:
            ConfigError: Unknown section or field, wrong type, value out of range.
        """
        known = known_settings({section: type(values) for section, values in self.sections.items()})
        changed = self
        for given in overrides:
            key, _, text = given.partition("=")
            changed = changed.derive(key, _typed(key, text, known, from_text=True), "given")
        return changed

    def derive(self, key: str, value: Any, why: str) -> Settings:
        """A copy with one value replaced and the reason as its source."""
        section, name = key.split(".")
        sections = {**self.sections, section: replace(self.sections[section], **{name: value})}
        return Settings(sections, {**self.sources, key: why})

    def to_toml(self, header: Mapping[str, Any]) -> str:
        """TOML with the source of each value as a comment; ``header`` becomes the top-level keys."""
        lines = [f"{key} = {_toml_value(value)}" for key, value in header.items()]
        for section, values in self.sections.items():
            lines += ["", f"[{section}]"]
            for f in dataclasses.fields(values):
                source = self.sources[f"{section}.{f.name}"]
                lines.append(f"{f.name} = {_toml_value(getattr(values, f.name))}  # {_one_line(source)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, types_by_section: Mapping[str, type]) -> Settings:
        """Read back what :meth:`to_toml` wrote.

        Raises:
            ConfigError: Not TOML, or a value that this version does not know.
        """
        try:
            tables = {k: v for k, v in tomllib.loads(text).items() if isinstance(v, dict)}
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config.toml is damaged: {error}") from error
        settings = cls.build(types_by_section, tables, "config.toml", ())
        return cls(settings.sections, dict.fromkeys(settings.sources, "config.toml"))


def field_help(kind: type) -> dict[str, str]:
    """{field: docstring below it, in one line} of a dataclass.

    Example:
        >>> field_help(EngineConfig)["device"]
        'auto, cpu, cuda, cuda:1, mps.'
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            found[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def known_settings(types_by_section: Mapping[str, type]) -> dict[str, Any]:
    """{"section.field": its type} of all settings."""
    found = {}
    for section, kind in types_by_section.items():
        hints = typing.get_type_hints(kind)
        found |= {f"{section}.{f.name}": hints[f.name] for f in dataclasses.fields(kind)}
    return found


def _typed(key: str, value: Any, known: Mapping[str, Any], *, from_text: bool = False) -> Any:
    if key not in known:
        raise ConfigError(f"unknown setting '{key}'{did_you_mean(key, known)}")
    wanted = known[key]
    if from_text:
        # What is not TOML, such as muon or data/tokenizer.json, is a bare word: a string.
        with contextlib.suppress(tomllib.TOMLDecodeError):
            value = tomllib.loads(f"value = {value}")["value"]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in options and type(value) is int:
        return float(value)
    if float in options and from_text and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # .5 and 5. are numbers to people, though not to TOML
    if int in options and type(value) is float and value.is_integer():
        return int(value)  # 1e4 is how people write ten thousand
    if str in options and from_text and not isinstance(value, str):
        return str(value)
    if type(value) not in options:
        names = " or ".join("bool (true or false)" if o is bool else o.__name__ for o in options)
        raise ConfigError(f"setting '{key}' must be of type {names}, found {value!r}")
    return value


def _one_line(text: str) -> str:
    """Text that a TOML comment may hold: no line ends, no control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes what TOML wants escaped, but for one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # 17 digits; inf and nan are TOML too
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    raise AssertionError(f"no TOML for {value!r}")
