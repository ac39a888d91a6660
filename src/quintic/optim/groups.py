"""Parameter groups of Muon: made from a routed module, one for each role, checked, and named in messages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from difflib import get_close_matches
from itertools import zip_longest
from numbers import Real
from typing import Any

from torch import Tensor, nn

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.linalg import resolve_schedule
from quintic.linalg.polar import METHODS
from quintic.linalg.schatten import schatten_exponent
from quintic.optim.decay import DECAYS
from quintic.optim.lr import SCALES, convert_lr
from quintic.optim.momentum import MOMENTUM_FORMS
from quintic.optim.routing import RoleTable, how_to_declare, roles
from quintic.optim.sharded import check_layout
from quintic.optim.split import Part, parts_of

__all__ = [
    "check_group",
    "check_names",
    "check_still_matrices",
    "groups_of",
    "groups_to_load",
    "matrices_in",
    "name_of",
    "param_groups",
    "warn_about_lr",
]

_ALGORITHMS = ("muon", "adamw")
_HALF = ("bfloat16", "float16")
_DTYPES = ("float32", "float64", *_HALF)
_NO_MATRICES = ("elements", "vector")  # layouts of what has one axis or none
_FOREIGN = {  # settings in groups of torch's and Keller's optimizers, which would do nothing here
    "use_muon": "algorithm='muon' or 'adamw'",
    "betas": "adamw_betas",
    "eps": "adamw_eps",
    "ns_coefficients": "coefficients",
    "adjust_lr_fn": "scale='keller' for 'original', 'moonlight' for 'match_rms_adamw'",
    "adamw_lr": "lr, beside algorithm='adamw'",
    "adamw_weight_decay": "weight_decay, beside algorithm='adamw'",
}
_MARKS = ("algorithm", "scale", "adamw_betas")  # settings by which a state is known to be ours
_UNIT_SCALES = ("keller", "mup", "none")
_SMALLEST = 5e-3  # a rate under a scale of order 1 that is not Adam's


def param_groups(
    model: nn.Module, *, strict: bool = False, vectors: str = "adamw", embeddings: str = "adamw"
) -> list[dict[str, Any]]:
    """The parameter groups that ``Muon(model)`` makes, to be changed and given to Muon in the model's place.

    One group for each role and way of updating, in the order of the model. A group has ``role`` (the value of a
    :class:`quintic.core.Role`), ``algorithm``, ``params`` as (name, parameter) pairs, and ``layout``, ``split`` and
    ``orientation``, which say how matrices are read. Add ``lr``, ``weight_decay`` or any other setting of Muon, and
    part ``params`` as you like. Learning rates of groups keep their ratio under torch's schedulers.

    Args:
        model: Any module.
        strict: Refuse parameters whose role is ambiguous instead of warning.
        vectors: What updates gains, biases and the like, see :class:`quintic.optim.Muon`.
        embeddings: What updates embeddings and the head.

    Raises:
        ConfigError: As :func:`quintic.optim.roles`.

    Example:
        >>> from quintic.optim import Muon
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 100))
        >>> groups = param_groups(model)
        >>> [(group["role"], group["algorithm"]) for group in groups]
        [('embedding', 'adamw'), ('matrix', 'muon'), ('vector', 'adamw'), ('head', 'adamw')]
        >>> for group in groups:
        ...     if group["role"] == "vector":
        ...         group["weight_decay"] = 0.0
        >>> optimizer = Muon(groups, lr=2e-3, weight_decay=0.1)
    """
    return groups_of(model, roles(model, strict=strict, vectors=vectors, embeddings=embeddings))


def groups_of(model: nn.Module, table: RoleTable) -> list[dict[str, Any]]:
    """Named parameter groups of a routed module, one per role and way of updating; warns of what was assumed."""
    if table.ambiguous:
        names = ", ".join(row.name for row in table.ambiguous)
        warnings.warn(
            f"roles not declared and assumed: {names}. {how_to_declare(table.ambiguous[0])}; print roles(model) to see "
            "them, and strict=True makes this an error",
            stacklevel=3,
        )
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for row in table:
        how = {
            "role": row.role.value, "algorithm": row.algorithm, "layout": row.layout, "split": row.split,
            "orientation": row.orientation,
        }  # fmt: skip
        groups.setdefault(str(how), {"params": [], **how})["params"].append((row.name, parameters[row.name]))
    return list(groups.values())


def groups_to_load(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of a state dict, cut as those of the optimizer that loads it, with settings that are younger than it.

    Raises:
        CheckpointError: They are another optimizer's.
    """
    for group in saved:
        if missing := [name for name in _MARKS if name not in group]:
            raise CheckpointError(
                f"this is not a state of quintic's Muon: a group has no {', '.join(missing)}. "
                "Load states of torch's, Keller's or Moonlight's Muon with quintic.optim.load_foreign_state"
            )
    groups = _cut(saved, own)
    return [{**(mine or {}), **group} for group, mine in zip_longest(groups, own[: len(groups)])]


def _cut(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of a state dict, cut by the names of parameters: once all roles updated in one way had one together.

    Groups without names, with other ones, or that would have to be put together are returned as they are.
    """
    there, here = ([group.get("param_names") for group in groups] for groups in (saved, own))
    if there == here or not all(there) or not all(here):
        return saved
    home = {name: i for i, group in enumerate(saved) for name in group["param_names"]}
    cut = []
    for group in own:
        homes = [home.get(name, -1) for name in group["param_names"]]
        if len(set(homes)) != 1 or homes[0] < 0:
            return saved
        old = saved[homes[0]]
        numbers = dict(zip(old["param_names"], old["params"], strict=True))
        names = list(group["param_names"])
        cut.append({**old, "params": [numbers[name] for name in names], "param_names": names})
    return cut if sum(len(group["params"]) for group in cut) == len(home) else saved


def warn_about_lr(groups: list[dict[str, Any]], *, shared: bool) -> None:
    """Warn of one rate that is meant for the wrong half, the commonest mistake with Muon.

    Under a scale of order 1 Adam's learning rate trains matrices far too slowly, and what suits them is far too much
    for Adam.

    Args:
        groups: Of the optimizer.
        shared: AdamW's half was given no rate of its own.
    """
    known = [group for group in groups if isinstance(group["lr"], float)]
    units = [group for group in known if group["algorithm"] == "muon" and group["scale"] in _UNIT_SCALES]
    for group in units:
        lr, scale = group["lr"], group["scale"]
        if 0 < lr < _SMALLEST:
            fit = convert_lr(lr, group["weight_decay"], "moonlight", scale, 1024)
            warnings.warn(
                f"lr = {lr:g} looks like Adam's, but scale={scale!r} needs about 0.2 sqrt(width) times more "
                f"(width 1024: lr = {fit.lr:.3g}, weight_decay = {fit.weight_decay:.3g}, see convert_lr); "
                "or use scale='moonlight'",
                stacklevel=3,  # the line that makes the optimizer
            )
            return
    rates = [group["lr"] for group in known if group["algorithm"] == "adamw"]
    for group in units if shared else ():
        lr, scale = group["lr"], group["scale"]
        if lr >= _SMALLEST and lr in rates:
            fit = convert_lr(lr, group["weight_decay"], scale, "moonlight", 1024)
            warnings.warn(
                f"lr = {lr:g} with scale={scale!r} is the rate of AdamW's half too (embeddings, head, gains, biases), "
                f"which needs about 0.2 sqrt(width) times less: give adamw_lr and adamw_weight_decay (width 1024: "
                f"{fit.lr:.3g} and {fit.weight_decay:.3g}, see convert_lr); or use scale='moonlight'",
                stacklevel=3,
            )
            return


def matrices_in(group: dict[str, Any], t: Tensor) -> list[Part]:
    """The matrices of a parameter of a group of Muon, or of its gradient or momentum."""
    return parts_of(t, group["layout"] or "stack", group["split"], group["orientation"])


def name_of(group: dict[str, Any], p: Tensor) -> str:
    """The parameter as a message should call it."""
    index = next(i for i, other in enumerate(group["params"]) if other is p)
    names = group.get("param_names")
    return repr(names[index]) if names else f"parameter {index}"


def check_still_matrices(group: dict[str, Any]) -> None:
    """Raise ConfigError if a matrix of a group of Muon has been flattened, or taken away, since it was given."""
    if group["algorithm"] != "muon" or group["layout"] in _NO_MATRICES:
        return
    for p in group["params"]:
        if p.ndim < 2:
            raise ConfigError(
                f"{name_of(group, p)} was a matrix and now has shape {tuple(p.shape)}: it was flattened or sharded "
                "away, and Muon needs whole matrices. Shard with torch's fully_shard, which keeps shapes"
            )


def check_names(group: dict[str, Any], known: Collection[str]) -> None:
    """Raise ConfigError for a setting that would do nothing: another library's, or one that is misspelt.

    Others are left alone: schedulers and users keep numbers of their own in groups.
    """
    for name in sorted(group.keys() - set(known)):
        if name in _FOREIGN:
            raise ConfigError(f"a group has {name!r}, which means nothing here; expected {_FOREIGN[name]}")
        if near := get_close_matches(name, known, 1, 0.85):
            raise ConfigError(f"a group has {name!r}; did you mean {near[0]!r}?")


def check_group(group: dict[str, Any]) -> None:
    """Raise ConfigError for the first setting or parameter that cannot work."""
    lr, betas = group["lr"], group["adamw_betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ConfigError(f"adamw_betas = {betas!r}; expected two numbers, such as (0.9, 0.95)")
    of_memory = {"momentum": group["momentum"], "adamw_betas[0]": betas[0], "adamw_betas[1]": betas[1]}
    of_size = {"weight_decay": group["weight_decay"], "adamw_eps": group["adamw_eps"]}
    for name, value in {"lr": lr, **of_size, **of_memory}.items():
        if not isinstance(value, Real | Tensor):
            raise ConfigError(f"{name} = {value!r}; expected a number, found {type(value).__name__}")
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ConfigError(f"lr is a tensor of shape {tuple(lr.shape)}; expected a number or a 0-d tensor")
    elif not 0.0 <= lr < math.inf:
        raise ConfigError(f"lr = {lr}; expected a finite number, 0 or more")
    for name, value in of_size.items():
        if not 0.0 <= value < math.inf:
            raise ConfigError(f"{name} = {value}; expected a finite number, 0 or more")
    for name, value in of_memory.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{name} = {value}; expected a number in [0, 1)")
    choices = {
        "scale": SCALES, "algorithm": _ALGORITHMS, "method": METHODS, "decay": DECAYS, "momentum_form": MOMENTUM_FORMS,
    }  # fmt: skip
    for name, known in choices.items():
        if group[name] not in known:
            raise ConfigError(f"unknown {name} {group[name]!r}{suggest(str(group[name]), known)}")
    if group["ns_dtype"] not in (None, *_DTYPES):
        raise ConfigError(f"ns_dtype = {group['ns_dtype']}; expected None or a dtype of {', '.join(_DTYPES)}")
    if group["method"] == "gram" and group["ns_dtype"] in _HALF:
        raise ConfigError(f"method 'gram' loses all accuracy in {group['ns_dtype']}; use 'newton-schulz' or 'auto'")
    resolve_schedule(group["coefficients"], group["ns_steps"])
    schatten_exponent(group["norm"])
    rank = group["decay_rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"decay_rank = {rank!r}; expected a whole number, 1 or more")
    if len({id(p) for p in group["params"]}) < len(group["params"]):
        raise ConfigError("a parameter is listed twice in one group; pass each parameter once")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ConfigError(f"{name_of(group, p)} is of {p.dtype}; expected real floating-point parameters")
        check_layout(p, name_of(group, p))
        if group["algorithm"] != "muon":
            continue
        advice = "put it in a group with algorithm='adamw', or pass the whole module, which routes it"
        if p.ndim < 2 and group["layout"] not in _NO_MATRICES:
            raise ConfigError(f"{name_of(group, p)} of shape {tuple(p.shape)} is not a matrix; {advice}")
        if p.ndim > 3 and group["layout"] is None:
            raise ConfigError(
                f"{name_of(group, p)} of shape {tuple(p.shape)} can be read in two ways: say layout='conv' for a "
                f"convolution (out, in * kernel) or layout='stack' for matrices in the last two axes; or {advice}"
            )
        try:
            matrices_in(group, p)
        except ConfigError as error:
            raise ConfigError(f"{name_of(group, p)} of shape {tuple(p.shape)}: {error}") from None
