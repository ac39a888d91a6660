"""``quintic roles``: which parameter is trained by which algorithm, and why."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, kind_of, open_run, split_arguments
from quintic.core import ConfigError

__all__ = ["roles"]


def roles(
    *arguments: str,
    task: str | None = None,
    size: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Print the table of parameters: shape, role, algorithm, scale and reason.

    Parameters
    ----------
    arguments
        A run folder, or settings as section.field=value.
    task
        What would be trained: lm, as if left out, tarflow or ddpm (with images of 28 x 28 pixels unless said
        otherwise, and of 10 classes where it learns classes).
    size
        Preset, as for train; laptop if left out.
    as_json
        Print a JSON array with an object for each parameter.

    Examples
    --------
    quintic roles runs/book
    quintic roles --size tiny
    quintic roles optim.embeddings=row-l2
    quintic roles --task tarflow --json
    """
    paths, overrides = split_arguments(arguments)
    if paths:
        if len(paths) > 1 or task is not None or size is not None:
            raise ConfigError("give one run folder, which has its task and sizes; or --task, --size and settings")
        _, settings, header = open_run(paths[0])
        name, settings = str(header["task"]), settings.override(overrides)
    else:
        name = task or "lm"
        settings = kind_of(name).with_shape(name, build_settings(name, size or "laptop", overrides))

    import torch

    from quintic.optim import roles as table_of

    optim = settings["optim"]
    with torch.device("meta"):
        model = kind_of(name).build(name, settings)
    table = table_of(model, scale=optim.scale, vectors=optim.vectors, embeddings=optim.embeddings)
    if as_json:
        rows = [
            {"name": r.name, "shape": r.shape, "role": r.role.value, "algorithm": r.algorithm, "why": r.why}
            for r in table
        ]
        say(json.dumps(rows))
        return
    say(str(table))
