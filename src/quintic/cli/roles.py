"""``quintic roles``: which parameter is trained by which algorithm, and why."""

from __future__ import annotations

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, kind_of, split_arguments
from quintic.core import ConfigError

__all__ = ["roles"]


def roles(*arguments: str, task: str = "lm", size: str = "laptop") -> None:
    """Print the table of parameters: shape, role, algorithm, scale and reason.

    Parameters
    ----------
    arguments
        Settings as section.field=value.
    task
        What would be trained: lm.
    size
        Preset: tiny, laptop, small.
    """
    paths, overrides = split_arguments(arguments)
    if paths:
        raise ConfigError(f"roles takes settings only, found the path {paths[0]}")
    settings = build_settings(task, size, overrides)

    import torch

    from quintic.optim import roles as table_of

    optim = settings["optim"]
    with torch.device("meta"):
        model = kind_of(task).build(task, settings)
    table = table_of(model, scale=optim.scale, vectors=optim.vectors, embeddings=optim.embeddings)
    say(str(table))
