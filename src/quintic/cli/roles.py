"""``quintic roles``: which parameter is trained by which algorithm, and why."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, kind_of, split_arguments
from quintic.core import ConfigError

__all__ = ["roles"]


def roles(
    *arguments: str,
    task: str = "lm",
    size: str = "laptop",
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Print the table of parameters: shape, role, algorithm, scale and reason.

    Parameters
    ----------
    arguments
        Settings as section.field=value.
    task
        What would be trained: lm, tarflow or ddpm (with images of 28 x 28 pixels unless said otherwise, and of 10 classes
        where it learns classes).
    size
        Preset, as for train.
    as_json
        Print a JSON array with an object for each parameter.

    Examples
    --------
    quintic roles --size tiny
    quintic roles optim.embeddings=row-l2
    quintic roles --task tarflow --json
    """
    paths, overrides = split_arguments(arguments)
    if paths:
        raise ConfigError(f"roles takes settings only, found the path {paths[0]}")
    settings = kind_of(task).with_shape(task, build_settings(task, size, overrides))

    import torch

    from quintic.optim import roles as table_of

    optim = settings["optim"]
    with torch.device("meta"):
        model = kind_of(task).build(task, settings)
    table = table_of(model, scale=optim.scale, vectors=optim.vectors, embeddings=optim.embeddings)
    if as_json:
        rows = [
            {"name": r.name, "shape": r.shape, "role": r.role.value, "algorithm": r.algorithm, "why": r.why}
            for r in table
        ]
        say(json.dumps(rows))
        return
    say(str(table))
