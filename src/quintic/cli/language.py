"""How language models are wired: sections, text, model, generation, evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.cli.printing import visible
from quintic.core import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from quintic.cli.wiring import LoadedModel
    from quintic.data import Tokenizer
    from quintic.data.tokens import Split
    from quintic.engine import Settings
    from quintic.lm import LanguageModel
    from quintic.lm.task import LanguageModelTask

__all__ = [
    "EMBEDDED",
    "NEXT",
    "OF_FILES",
    "READING",
    "UNIT",
    "build",
    "evaluate",
    "generate",
    "of_run",
    "own_task",
    "own_tokenizer",
    "prepare",
    "sections",
    "with_shape",
]

EMBEDDED = "Moby Dick"
"""Title of the data that comes with the package."""
READING = "reading text"
OF_FILES = ("data.encoding", "data.field", "data.test_fraction")
"""Settings that say how files are read and how much of them, of any text."""
UNIT = " nats"
"""Of the loss."""
NEXT = 'quintic generate {run} --prompt "..."'
"""What one would do with a finished run."""
_FEW = 1000
"""Tokens that are too few to judge a model by."""


def sections(task: str) -> dict[str, type]:
    """The task's own sections."""
    from quintic.data import DataConfig
    from quintic.lm import LMConfig

    return {task: LMConfig, "data": DataConfig}


def prepare(
    task: str, paths: Sequence[Path], settings: Settings, progress: Callable[[str], None]
) -> tuple[LanguageModelTask, Settings, list[str]]:
    """Text to tokens, the sizes that follow from it, and the task; see :func:`quintic.cli.wiring.build_task`."""
    from quintic.data import prepare as prepare_text
    from quintic.lm.task import LanguageModelTask, derived_fields

    if Path(tokenizer := settings["data"].tokenizer).is_file() and not Path(tokenizer).is_absolute():
        # Absolute, so that a resume finds it from any folder.
        settings = settings.derive("data.tokenizer", str(Path(tokenizer).absolute()), "given")
    data = prepare_text(list(paths) or None, settings["data"], progress)
    source = settings.sources["lm.vocab_size"]
    given = source == "given" or source.startswith("from ")
    if given and settings["lm"].vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(
            f"lm.vocab_size = {settings['lm'].vocab_size} is below the tokenizer's {data.tokenizer.vocab_size} tokens; "
            f"leave it out, or train a smaller tokenizer with data.vocab_size={settings['lm'].vocab_size}"
        )
    if source != "config.toml":  # a run's own settings are resolved already
        for name, (value, why) in derived_fields(settings["lm"], data.tokenizer).items():
            if not (name == "vocab_size" and given):
                settings = settings.derive(f"lm.{name}", value, why)
    made = LanguageModelTask(settings["lm"], data, cross_documents=settings["data"].cross_documents)
    if not made.num_examples:
        parts = settings["data"]
        raise DataError(
            f"no text is left to train on: data.validation_fraction = {parts.validation_fraction:g} and "
            f"data.test_fraction = {parts.test_fraction:g} take all of it; make them smaller"
        )
    size, context = settings["engine"].batch_size, settings["lm"].context
    if made.num_examples < size:
        data.warnings.append(
            f"the text to train on is {made.num_examples} windows of lm.context = {context} tokens, and a step takes "
            f"engine.batch_size = {size}: they repeat within a step; make either smaller"
        )
    if 0 < data.validation.num_tokens < _FEW:
        data.warnings.append(
            f"the validation split is {_size(data.validation)}, too few for its loss to say much about the model; "
            f"give more text, or make data.validation_fraction = {settings['data'].validation_fraction:g} larger"
        )
    data.warnings.extend(_taken_as_text(paths))
    return made, settings, data.warnings


def with_shape(task: str, settings: Settings) -> Settings:
    """Settings of a model that can be built without data; text needs nothing."""
    return settings


def build(task: str, settings: Settings) -> LanguageModel:
    """The model, uninitialised."""
    from quintic.lm import LanguageModel

    return LanguageModel(settings[task], initialize=False)


def generate(loaded: LoadedModel, folder: Path, options: dict[str, Any]) -> None:
    """Text to standard output as it is made; a terminal is shown control characters, a file gets them."""
    from quintic.cli.wiring import refuse
    from quintic.lm.task import generate_text

    known = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    sampling: dict[str, Any] = {"max_tokens": 200} | {name: options.pop(name) for name in known if name in options}
    prompt, n = options.pop("prompt", ""), options.pop("n", 1)
    refuse(options, "lm")
    if n < 1:
        raise ConfigError(f"--n must be at least 1, found {n}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt is not UTF-8 text ({error.reason} at character {error.start})") from error
    tokenizer = own_tokenizer(folder, loaded.settings)
    model: LanguageModel = loaded.model  # type: ignore[assignment]
    shown = visible if sys.stdout.isatty() else str
    first = sampling.pop("seed")
    for seed in range(first, first + n):
        if n > 1:  # any of them can be had again alone
            sys.stdout.write(f"--- seed {seed}\n")
        sys.stdout.write(shown(prompt))
        sys.stdout.flush()
        with loaded.precision:
            for piece in generate_text(model, tokenizer, prompt, seed=seed, **sampling):
                sys.stdout.write(shown(piece))
                sys.stdout.flush()
        sys.stdout.write("\n")


def of_run(folder: Path, settings: Settings) -> Settings:
    """Settings of a run that name its own copy of a tokenizer: the file it came from may be gone, or another by now."""
    from quintic.data.config import OWN_TOKENIZERS

    own = folder / "tokenizer.json"
    if settings["data"].tokenizer in OWN_TOKENIZERS or not own.is_file():
        return settings
    return settings.derive("data.tokenizer", str(own.absolute()), settings.sources["data.tokenizer"])


def own_tokenizer(folder: Path, settings: Settings) -> Tokenizer:
    """The tokenizer of a run, which reads texts as the run did."""
    from quintic.data import Tokenizer

    data = settings["data"]
    return Tokenizer.load(folder / "tokenizer.json", separator=data.separator, special_tokens=data.special_tokens)


def own_task(loaded: LoadedModel, folder: Path) -> LanguageModelTask:
    """The model's task with the text of its run.

    Raises:
        DataError: It was imported without text, or the text has changed since.
    """
    from quintic.data import prepare as prepare_text
    from quintic.lm.task import LanguageModelTask

    settings, header = loaded.settings, loaded.header
    if not header["fingerprint"]:
        raise DataError(f"{folder} was imported without text; name the text to use after the folder")
    data = prepare_text([Path(path) for path in header["paths"]] or None, settings["data"])
    task = LanguageModelTask(settings["lm"], data, cross_documents=settings["data"].cross_documents)
    if task.fingerprint != header["fingerprint"]:
        raise DataError(f"the text of {folder} has changed since it was trained; name the text to use after the folder")
    return task


def evaluate(
    loaded: LoadedModel, folder: Path, paths: Sequence[Path], split: str, options: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Loss and bits per byte on a split of the run's own data, or on other text: for a person, and for a script."""
    from quintic.cli.wiring import refuse
    from quintic.data import prepare as prepare_text
    from quintic.lm.task import LanguageModelTask

    refuse(options, "lm")
    if split not in ("test", "validation"):
        raise ConfigError(f"unknown split {split!r}{suggest(split, ['test', 'validation'])}")
    settings = loaded.settings
    if paths:
        part = settings["data"].test_fraction if settings.sources["data.test_fraction"] == "given" else 1.0
        config = replace(
            settings["data"], tokenizer=str(folder / "tokenizer.json"), validation_fraction=0.0, test_fraction=part
        )
        data, what = prepare_text(list(paths), config), ", ".join(map(str, paths))
        if part < 1.0:
            what = f"last {100 * part:g} % of {what}"
        task = LanguageModelTask(settings["lm"], data, cross_documents=settings["data"].cross_documents)
        split = "test"
    else:
        task, what = own_task(loaded, folder), f"{split} split of {folder}"
    with loaded.precision:
        values = task.evaluate(loaded.model, split)
    if not values:
        raise DataError(f"the {split} split of {folder} is empty; name the text to evaluate on")
    prefix = "val" if split == "validation" else split
    loss, bits = values[f"{prefix}_loss"], values[f"{prefix}_bits_per_byte"]
    chosen = task.data.validation if split == "validation" else task.data.test
    lines = [
        *_taken_as_text(paths),
        f"{what}: loss {loss:.4f} nats a token, {bits:.4f} bits per byte ({_size(chosen)})",
    ]
    if chosen.num_tokens < _FEW:
        lines.append("warning: so little text says little about the model; name more of it")
    size = {"bytes": chosen.num_bytes, "tokens": chosen.num_tokens}
    return lines, {"data": what, "loss": loss, "bits_per_byte": bits, **size}


def _size(split: Split) -> str:
    return f"{split.num_bytes:,} bytes, {split.num_tokens:,} tokens"


def _taken_as_text(paths: Sequence[Path]) -> list[str]:
    """A line about files that were named and whose endings speak of something else than plain text or JSON."""
    from quintic.data.readers import EXTENSIONS

    known = (*EXTENSIONS, ".json")
    odd = [
        str(path) for path in paths if not path.is_dir() and not path.name.lower().removesuffix(".gz").endswith(known)
    ]
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return [f"read as plain text, whatever the ending: {', '.join(odd[:3])}{more}"] if odd else []
