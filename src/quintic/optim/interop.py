"""Take over the optimizer state of other Muons: the momentum of matrices and Adam's moments of the rest.

| source | momentum_buffer | Adam's moments |
|---|---|---|
| torch: torch.optim.Muon, and torch.optim.AdamW beside it | B <- mu B + (1 - mu) G | exp_avg, exp_avg_sq |
| keller: the four classes of KellerJordan/Muon | the same | exp_avg, exp_avg_sq |
| moonlight: toy_train.py of MoonshotAI/Moonlight | B <- mu B + G | moment1, moment2 |

The sum form is 1 / (1 - mu) times the average form, and a buffer is converted to the form that ours has
(:mod:`quintic.optim.momentum`), by default the average. Only state is taken over: learning rate, decay and scale stay
those of the optimizer that loads, since they mean different things there (:func:`quintic.optim.convert_lr`).

These files number parameters in the order in which they were given to the optimizer. A number says nothing about
another model's order, and shapes agree by accident, so parameters are matched by name: by the names in the file
if that optimizer was given ``model.named_parameters()``, else by names passed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.optim.adamw import state_dtype
from quintic.optim.momentum import gradient_weight
from quintic.optim.muon import Muon

__all__ = ["SOURCES", "ForeignState", "load_foreign_state"]

SOURCES = ("torch", "keller", "moonlight")
"""Names of the optimizers whose state can be loaded."""

_MARKS = {  # settings in every group of that optimizer: any one of these sets
    "torch": ({"ns_coefficients", "adjust_lr_fn"}, {"betas", "amsgrad"}),
    "keller": ({"use_muon"}, {"lr", "weight_decay", "momentum"}),
    "moonlight": ({"wd", "adamw_betas"},),
}
_FORMS = {"torch": "average", "keller": "average", "moonlight": "sum"}
_NOT_KELLER = {"nesterov", "dampening"}  # of torch.optim.Muon and SGD, whose groups have Keller's settings too
_RENAMED = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
_OURS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq", "step")}


@dataclass(frozen=True)
class ForeignState:
    """What :func:`load_foreign_state` did."""

    loaded: tuple[str, ...]
    """Parameters that took state over."""
    fresh: tuple[str, ...]
    """Parameters of the optimizer that the file says nothing of; they are as they were."""


@torch.no_grad()
def load_foreign_state(
    optimizer: Muon, state_dict: Mapping[str, Any], source: str, *, names: Sequence[str] | None = None
) -> ForeignState:
    """Fill an optimizer's state from the ``state_dict()`` of another implementation of Muon.

    Load with ``torch.load(path, weights_only=True)``. Where matrices and the rest had an optimizer each, call this
    once for each state. Nothing is changed unless everything fits.

    Args:
        optimizer: Ours, over the same model. Given the model (or named parameters) it knows their names; given
            bare tensors they are matched by position, and the file must have as many.
        state_dict: With ``state`` and ``param_groups``.
        source: ``torch``, ``keller`` or ``moonlight``.
        names: Names of the parameters in the order of the file, group after group, unless the file has them. For
            ``[p for n, p in model.named_parameters() if p.ndim == 2]`` these are the n of the same expression.
            Keller's MuonWithAuxAdam, but not its SingleDevice form, sorts its matrices by size, largest first.

    Returns:
        Which parameters were loaded and which were not in the file.

    Raises:
        ConfigError: Unknown source.
        CheckpointError: The file is of another optimizer, has no names, or does not fit a parameter, which is named.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2))
        >>> old = torch.optim.Muon([model[0].weight])
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> old.step()
        >>> new = Muon([{"params": [("0.weight", model[0].weight)]}])
        >>> load_foreign_state(new, old.state_dict(), "torch", names=["0.weight"])
        ForeignState(loaded=('0.weight',), fresh=())
        >>> bool((new.state[model[0].weight]["momentum_buffer"] == old.state[model[0].weight]["momentum_buffer"]).all())
        True
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}{suggest(str(source), SOURCES)}")
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise CheckpointError(f"this is not the state_dict() of an optimizer: it has no {', '.join(sorted(missing))}")
    _check_source(state_dict["param_groups"], source)
    matched = _match(optimizer, state_dict["param_groups"], names)

    new: dict[Tensor, dict[str, Tensor]] = {}
    loaded = []
    for key, theirs, name, ours, p in matched:
        entry = {k: v for k, v in state_dict["state"].get(key, {}).items() if k != "use_muon"}
        if entry:  # a parameter that never had a gradient has no state
            new[p] = _convert(entry, theirs, source, name, ours, p)
            loaded.append(name)
    for p, tensors in new.items():
        optimizer.state[p].clear()
        optimizer.state[p].update(tensors)
    fresh = [name for name, _, p in _named(optimizer) if p not in new]
    return ForeignState(tuple(loaded), tuple(fresh))


def _check_source(groups: list[dict[str, Any]], source: str) -> None:
    for i, group in enumerate(groups):
        if not any(mark <= group.keys() for mark in _MARKS[source]) or (
            source == "keller" and _NOT_KELLER & group.keys()
        ):
            settings = ", ".join(sorted(group.keys() - {"params", "param_names"}))
            raise CheckpointError(f"group {i} does not look like one of {source!r}: its settings are {settings}")


def _match(
    optimizer: Muon, groups: list[dict[str, Any]], names: Sequence[str] | None
) -> list[tuple[Any, dict[str, Any], str, dict[str, Any], Tensor]]:
    """(key in the file, its group there, name, our group, our parameter) of each parameter in the file."""
    theirs = [(key, group) for group in groups for key in group["params"]]
    ours = _named(optimizer)
    if names is None and all("param_names" in group for group in groups):
        names = list(itertools.chain.from_iterable(group["param_names"] for group in groups))
    if "param_names" not in optimizer.param_groups[0]:  # torch has them in all groups or in none
        if len(theirs) != len(ours):
            raise CheckpointError(
                f"the state has {len(theirs)} parameters and this optimizer {len(ours)}, without names to match "
                "them by; give Muon the model or model.named_parameters()"
            )
        return [(*pair, *own) for pair, own in zip(theirs, ours, strict=True)]
    if names is None:
        raise CheckpointError(
            f"the state numbers its {len(theirs)} parameters and has no names; pass names=[...] in the order in "
            "which they were given to that optimizer"
        )
    if len(names) != len(theirs):
        raise CheckpointError(f"{len(names)} names for the {len(theirs)} parameters of the state; expected as many")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise CheckpointError(f"the name {twice!r} occurs twice; each parameter needs its own")
    known = {name: (mine, p) for name, mine, p in ours}
    if unknown := [name for name in names if name not in known]:
        raise CheckpointError(
            f"the state is of a parameter {unknown[0]!r} that this optimizer lacks{suggest(unknown[0], known)}"
        )
    return [(*pair, name, *known[name]) for pair, name in zip(theirs, names, strict=True)]


def _named(optimizer: Muon) -> list[tuple[str, dict[str, Any], Tensor]]:
    """(name or number, group, parameter) of each of our parameters."""
    found = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"parameter {len(found) + i}" for i in range(len(group["params"]))]
        found += [(name, group, p) for name, p in zip(names, group["params"], strict=True)]
    return found


def _convert(
    entry: dict[str, Any], theirs: dict[str, Any], source: str, name: str, ours: dict[str, Any], p: Tensor
) -> dict[str, Tensor]:
    """One parameter's state in our form; fails with the parameter's name."""
    entry = {_RENAMED.get(key, key): value for key, value in entry.items()}
    algorithm = ours["algorithm"]
    wanted = _OURS[algorithm]
    if entry.keys() != set(wanted):
        found = ", ".join(sorted(entry))
        other = next((a for a, keys in _OURS.items() if entry.keys() == set(keys)), None)
        if other:
            raise CheckpointError(
                f"{name} was under {other} (its state has {found}) and is under {algorithm} here; give it to the other "
                f"half with a group of algorithm={other!r}, or leave it out of the state"
            )
        raise CheckpointError(f"the state of {name} has {found}; expected {', '.join(wanted)}")
    converted = {}
    for key in wanted:
        value = entry[key] if isinstance(entry[key], Tensor) else torch.as_tensor(entry[key], device="cpu")
        if key == "step":
            converted[key] = value.to(p.device, torch.float32, copy=True).reshape(())
            continue
        if value.shape != p.shape:
            raise CheckpointError(
                f"{key} of {name} has shape {tuple(value.shape)} in the state and {tuple(p.shape)} here; "
                "the state is of another model, or names are in another order"
            )
        converted[key] = value.to(p.device, state_dtype(p.dtype), copy=True).contiguous()
    if algorithm == "muon":
        mu = theirs["momentum"]
        factor = gradient_weight(ours["momentum_form"], mu) / gradient_weight(_FORMS[source], mu)
        converted["momentum_buffer"].mul_(factor)
    return converted
