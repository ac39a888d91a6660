"""Parameter groups of Muon: made from a routed module, checked, and named in messages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor, nn

from quintic.core import ConfigError, suggest
from quintic.linalg import resolve_schedule
from quintic.linalg.polar import METHODS
from quintic.linalg.schatten import schatten_exponent
from quintic.optim.decay import DECAYS
from quintic.optim.lr import SCALES, convert_lr
from quintic.optim.momentum import MOMENTUM_FORMS
from quintic.optim.routing import RoleTable, how_to_declare
from quintic.optim.sharded import check_layout
from quintic.optim.split import Part, parts_of

__all__ = [
    "check_group",
    "check_names",
    "check_still_matrices",
    "groups_of",
    "matrices_in",
    "name_of",
    "warn_about_small_lr",
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
}


def warn_about_small_lr(groups: list[dict[str, Any]]) -> None:
    """Adam's learning rate under a scale of order 1 trains far too slowly: the commonest mistake with Muon."""
    for group in groups:
        lr, scale = group["lr"], group["scale"]
        unit_scale = group["algorithm"] == "muon" and scale in ("keller", "mup", "none")
        if unit_scale and isinstance(lr, float) and 0 < lr < 5e-3:
            fit = convert_lr(lr, group["weight_decay"], "moonlight", scale, 1024)
            warnings.warn(
                f"lr = {lr:g} looks like Adam's, but scale={scale!r} needs about 0.2 sqrt(width) times more "
                f"(width 1024: lr = {fit.lr:.3g}, weight_decay = {fit.weight_decay:.3g}, see convert_lr); "
                "or use scale='moonlight'",
                stacklevel=3,  # the line that makes the optimizer
            )
            return


def groups_of(model: nn.Module, table: RoleTable) -> list[dict[str, Any]]:
    """Named parameter groups of a routed module, one per way of updating; warns of what was assumed."""
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
        how = {"algorithm": row.algorithm, "layout": row.layout, "split": row.split, "orientation": row.orientation}
        groups.setdefault(str(how), {"params": [], **how})["params"].append((row.name, parameters[row.name]))
    return list(groups.values())


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
