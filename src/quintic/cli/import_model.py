"""``quintic import``: a Hugging Face folder of the DeepSeek-V3 architecture as a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say

__all__ = ["import_model"]


def import_model(folder: Path, /, *, out: Annotated[Path, Parameter(name=["--out", "-o"])]) -> None:
    """Turn a DeepSeek-V3 folder into a run folder, to generate from, evaluate, or train further (train --from).

    Parameters
    ----------
    folder
        Folder with config.json, safetensors (one file, or shards with an index) and tokenizer.json.
    out
        Run folder to create.

    Examples
    --------
    quintic import exported --out runs/imported
    """
    from quintic.cli.origin import open_origin
    from quintic.cli.wiring import build_settings
    from quintic.engine import Run

    Run.refuse_existing(out)
    origin = open_origin(folder, "lm")
    settings = origin.settings("lm", build_settings("lm", "small", []))
    assert origin.tokenizer is not None
    header = {"task": "lm", "size": "imported", "paths": [], "fingerprint": ""}
    run = Run.create(out, settings, header, origin.weights)
    shutil.copyfile(origin.tokenizer, out / "tokenizer.json")
    run.record(task="lm", size="imported", title=folder.absolute().name, status="imported")
    say(f'{out} is ready; next: quintic generate {out} --prompt "..." - or: quintic train TEXT --from {out}')
