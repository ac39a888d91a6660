"""``quintic import``: a Hugging Face folder of the DeepSeek-V3 architecture as a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say
from quintic.core import CheckpointError, ConfigError

__all__ = ["import_model"]


def import_model(
    folder: Path, /, *arguments: str | Path, out: Annotated[Path, Parameter(name=["--out", "-o"])]
) -> None:
    """Turn a DeepSeek-V3 folder into a run folder, to generate from, evaluate, or train further (train --from).

    Parameters
    ----------
    folder
        Folder with config.json, safetensors (one file, or shards with an index) and tokenizer.json.
    arguments
        Settings of the run, as for train: data.special_tokens=token reads prompts as conversations written out,
        data.separator=TOKEN names the end of a text where no file does.
    out
        Run folder to create.

    Examples
    --------
    quintic import exported --out runs/imported
    quintic import exported --out runs/imported data.special_tokens=token
    """
    from quintic.cli.origin import open_origin
    from quintic.cli.wiring import build_settings, split_arguments
    from quintic.data.tokens import given_tokenizer
    from quintic.engine import Run

    paths, overrides = split_arguments(arguments)
    if paths:
        raise ConfigError(
            f"{paths[0]} is no setting; an import takes a folder and settings such as data.separator=TOKEN"
        )
    Run.refuse_existing(out)
    origin = open_origin(folder, "lm")
    settings = origin.settings("lm", build_settings("lm", "small", overrides))
    tokenizer = given_tokenizer(settings["data"])
    if tokenizer is None:
        raise ConfigError(f"data.tokenizer = {settings['data'].tokenizer}; an imported model needs that of its folder")
    if tokenizer.vocab_size > (rows := settings["lm"].vocab_size):
        raise CheckpointError(
            f"the tokenizer of {folder} has ids up to {tokenizer.vocab_size - 1}, its model has {rows} rows of "
            "vocabulary; put the tokenizer.json there that the model was trained with"
        )
    header = {"task": "lm", "size": "imported", "paths": [], "fingerprint": ""}
    run = Run.create(out, settings, header, origin.weights)
    tokenizer.save(out / "tokenizer.json")
    run.record(task="lm", size="imported", title=folder.absolute().name, status="imported")
    say(f'{out} is ready; next: quintic generate {out} --prompt "..." - or: quintic train TEXT --from {out}')
