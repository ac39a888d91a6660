"""Muon: momentum, then the matrix sign, then a step whose size depends on the shape (posts 10592, 10739, 11416).

For a matrix W (n outputs, m inputs) with gradient G at step t (mu: momentum, eta: learning rate, lambda: weight decay):

    B <- mu B + (1 - mu) G                      momentum, an average of gradients
    U  = mu B + (1 - mu) G  or  B               Nesterov or plain
    W <- (1 - eta lambda) W - eta s(n, m) msign(U)

Decay is decoupled and uses the base rate eta, never eta s. Since msign ignores scale, the average form of the
momentum gives the same direction as the posts' sum form B <- mu B + G, which can be had too
(:mod:`quintic.optim.momentum`).

One ``torch.optim.Optimizer`` also runs AdamW for what is not a matrix, so there is one state dict and, unless AdamW is
given its own, one learning rate. A step whose gradients contain a NaN or an infinity changes nothing at all, and is
counted.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor, nn

from quintic.core import ConfigError, suggest
from quintic.core.precision import accumulation_dtype
from quintic.linalg.coefficients import Coefficients
from quintic.linalg.workspace import Workspace
from quintic.optim.adamw import new_state, state_dtype, update_with_adamw
from quintic.optim.cap import cap_step_
from quintic.optim.groups import (
    check_group,
    check_names,
    check_still_matrices,
    groups_of,
    groups_to_load,
    matrices_in,
    name_of,
    warn_about_lr,
)
from quintic.optim.matrices import Piece, chunks, pieces_of, update_matrices
from quintic.optim.nonfinite import NONFINITE, any_nonfinite, sift_nonfinite_
from quintic.optim.routing import RoleTable, roles
from quintic.optim.sharded import (
    DISTRIBUTED,
    Divided,
    assemble,
    holds_whole_matrices,
    local,
    own,
    scatter_,
    settle_gradient_,
)
from quintic.optim.state import fit_state, top_space_of

__all__ = ["Muon"]

_ADJUST = {"original": "keller", "match_rms_adamw": "moonlight"}  # torch.optim.Muon's names
_SETTINGS = (
    "lr", "weight_decay", "momentum", "momentum_form", "nesterov", "scale", "ns_steps", "coefficients", "method",
    "ns_dtype", "maximize", "decay", "decay_rank", "norm",
)  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, in one optimizer.

    Given a module, every parameter is routed by its role (see :func:`quintic.optim.roles`; the table is in the
    attribute ``roles``). Each role has a group, which says so (``group["role"]``) and may be changed, see
    :func:`quintic.optim.param_groups`. Given tensors or parameter groups, Muon takes all of them: 2-D tensors as
    matrices, 3-D ones as stacks of matrices. A group may say ``algorithm="adamw"``, ``layout="conv"`` for convolution
    kernels, ``orientation="in_out"`` for matrices that are used as ``x @ W``, or ``split={"blocks": 3}`` and the like
    for fused projections and heads, see :mod:`quintic.optim.split`.

    The keywords of ``torch.optim.Muon`` are accepted. Unlike there, the default scale is ``moonlight``
    (``match_rms_adamw``), the default coefficients are ``quintic``, and products run in float32 on CPUs.

    Args:
        params: A module, parameters, (name, parameter) pairs, or groups of these.
        lr: Learning rate of both halves; a number or a 0-d tensor.
        weight_decay: Decoupled weight decay of both halves. Per step weights shrink by the rate of their half times it.
        momentum: Muon's momentum mu, in [0, 1).
        momentum_form: ``average`` of gradients or ``sum``, see :mod:`quintic.optim.momentum`; the same steps while mu
            is constant.
        nesterov: Use the Nesterov form.
        decay: ``frobenius``, which shrinks every singular value, or ``spectral``, which shrinks the largest of each
            matrix under Muon, see :mod:`quintic.optim.decay`. AdamW's half always has the first.
        decay_rank: How many singular values ``spectral`` shrinks.
        scale: Factor for a matrix shape: ``moonlight``, ``rms``, ``keller``, ``mup`` or ``none``, see
            :mod:`quintic.optim.lr`. With the first two Adam's learning rate and weight decay can be reused.
        norm: Trust region ``schatten:p`` of matrices, p from 1 to ``inf``, see :mod:`quintic.linalg.schatten`. The
            default is msign, ``schatten:2`` the gradient over its Frobenius norm. All but the default are best
            combined with ``scale="rms"``: the other factors are those of msign, whose updates are larger.
        cap: T of the loss-change cap, which replaces a warm-up, see :mod:`quintic.optim.cap`; ``None`` is no cap.
            Costs a copy of the parameters.
        vectors: Given a module, what updates gains, biases and whatever else is neither a matrix nor a table:
            ``adamw``, ``sign`` (of the momentum) or ``l2`` (the momentum over its length).
        embeddings: Given a module, what updates embeddings and the output head: ``adamw`` or ``row-l2``, each row of
            the momentum over its length. A row keeps moving until its momentum has vanished, long after its last
            gradient, since the length does not matter. With neither half AdamW there are no second moments.
        ns_steps: Steps of the polynomial; ``None`` is 5, or the length of a listed schedule.
        coefficients: Preset, triple or triples, see :mod:`quintic.linalg.coefficients`.
        method: How msign is computed, see :func:`quintic.linalg.msign`.
        ns_dtype: Dtype of msign's products; ``None`` is float32 on CPUs and picks by capability elsewhere, see
            :func:`quintic.linalg.msign`. Bfloat16 is faster on CPUs with AMX, and coarse.
        adamw_lr: Learning rate of AdamW's half; ``None`` is ``lr``, which suits both under the scales ``moonlight`` and
            ``rms`` only.
        adamw_weight_decay: Weight decay of AdamW's half; ``None`` is ``weight_decay``.
        adamw_betas: AdamW's decay rates.
        adamw_eps: AdamW's epsilon.
        distributed: How msign of matrices divided among processes (DTensor) is taken: ``owner`` (each by one process,
            two all-to-alls) or ``gather`` (by all), see :mod:`quintic.optim.sharded`. The results are the same.
        maximize: Ascend.
        nonfinite: What a step does if a gradient is NaN or infinite: ``skip`` (all of it), ``skip-parameter``,
            ``raise`` or ``propagate``, see :mod:`quintic.optim.nonfinite`.
        strict: Given a module, refuse parameters whose role is ambiguous instead of warning.
        ns_coefficients: torch's name for one triple of coefficients.
        eps: torch's guard against a zero norm; accepted and not used: msign here has none, being scale-invariant. So
            torch's steps fade some hundred steps after the last gradient that is not zero, while here they keep their
            size whatever is left of the momentum. What takes no part should have no gradient (None), and is left alone.
        adjust_lr_fn: torch's name for the scale: ``original`` is ``keller``, ``match_rms_adamw`` is ``moonlight``.

    Raises:
        ConfigError: A setting is out of range, a parameter under Muon is not a matrix, or (``strict``) ambiguous.

    State: ``momentum_buffer`` for Muon; ``step``, ``exp_avg``, ``exp_avg_sq`` for AdamW; float32 for half-precision
    parameters; ``top_space`` for spectral decay (of further parts ``top_space_1`` and so on).

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 100, bias=False))
        >>> optimizer = Muon(model, lr=2e-3)
        >>> [row.algorithm for row in optimizer.roles]
        ['adamw', 'muon', 'adamw', 'adamw']
        >>> model(torch.arange(5)).square().mean().backward()
        >>> optimizer.step()
    """

    roles: RoleTable | None
    """What is done with each parameter, if the optimizer was given a module."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        momentum_form: str = "average",
        decay: str = "frobenius",
        decay_rank: int = 1,
        scale: str = "moonlight",
        norm: str = "schatten:inf",
        cap: float | None = None,
        vectors: str = "adamw",
        embeddings: str = "adamw",
        ns_steps: int | None = None,
        coefficients: Coefficients = "quintic",
        method: str = "auto",
        ns_dtype: torch.dtype | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        distributed: str = "owner",
        maximize: bool = False,
        nonfinite: str = "skip",
        strict: bool = False,
        ns_coefficients: Sequence[float] | None = None,
        eps: float | None = None,
        adjust_lr_fn: str | None = None,
    ) -> None:
        del eps
        if ns_coefficients is not None:
            coefficients = ns_coefficients
        if adjust_lr_fn is not None:
            if adjust_lr_fn not in _ADJUST:
                raise ConfigError(f"unknown adjust_lr_fn {adjust_lr_fn!r}{suggest(adjust_lr_fn, _ADJUST)}")
            scale = _ADJUST[adjust_lr_fn]
        if cap is not None and not (isinstance(cap, Real) and cap > 0):
            raise ConfigError(f"cap = {cap!r}; expected a positive number, or None for no cap")
        if nonfinite not in NONFINITE:
            raise ConfigError(f"unknown nonfinite {nonfinite!r}{suggest(nonfinite, NONFINITE)}")
        if distributed not in DISTRIBUTED:
            raise ConfigError(f"unknown distributed {distributed!r}{suggest(distributed, DISTRIBUTED)}")
        self.roles = None
        self.cap = cap
        self.distributed = distributed
        self.nonfinite = nonfinite
        self._space = Workspace()
        given = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
        self._of_adamw = {name: value for name, value in given.items() if value is not None}
        if isinstance(params, nn.Module):
            self.roles = roles(params, scale=scale, strict=strict, vectors=vectors, embeddings=embeddings)
            params = groups_of(params, self.roles)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "decay": decay,
            "decay_rank": decay_rank,
            "momentum": momentum,
            "momentum_form": momentum_form,
            "nesterov": nesterov,
            "scale": scale,
            "norm": norm,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "method": method,
            "ns_dtype": None if ns_dtype is None else str(ns_dtype).removeprefix("torch."),  # plain data in checkpoints
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "maximize": maximize,
            "role": None,
            "algorithm": "muon",
            "layout": None,
            "split": None,
            "orientation": "out_in",
        }
        super().__init__(params, defaults)
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        # Written in place only: what compiled code assigns to an optimizer is lost.
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._cap_factor = torch.ones((), dtype=accumulation_dtype(device), device=device)
        warn_about_lr(self.param_groups, shared=adamw_lr is None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; keywords as for the constructor, and ``algorithm``, ``layout``, ``split``, ``orientation``.

        Raises:
            ConfigError: A setting is out of range or a parameter under Muon is not a matrix.
        """
        if isinstance(param_group, dict) and param_group.get("algorithm") == "adamw":
            for name, value in self._of_adamw.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            check_names(param_group, self.defaults)
            check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite. Reading it waits for the device."""
        return int(self._skipped)

    @property
    def cap_factor(self) -> Tensor:
        """By what the cap multiplied the last step, 0-d; 1 if it was short enough or there is no cap."""
        return self._cap_factor.clone()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. Parameters without a gradient are untouched, and gradients are only read, but for a DTensor
        whose sum is pending (Partial), which is replaced by the sum.

        Args:
            closure: Recomputes the loss and the gradients; called with gradients enabled.

        Returns:
            The closure's loss.

        Raises:
            ConfigError: A gradient is sparse, or a matrix has been flattened or sharded away.
            NonFiniteGradientError: A gradient is not finite, with ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(group, self._active(group)) for group in self.param_groups]
        if self.nonfinite != "skip":
            active = sift_nonfinite_(active, self.nonfinite)
        gradients = [p.grad for _, params in active for p in params if p.grad is not None]
        if gradients:
            bad = any_nonfinite(gradients)
            if _may_look(bad) and bad and not self.skipped_steps:
                warnings.warn("a gradient is not finite: this step, and any such step, is left out", stacklevel=4)
            self._skipped = _placed(self._skipped, bad.device)
            self._skipped.add_(bad)
            before = [] if self.cap is None else [p.clone() for _, params in active for p in params]
            self._muon([pair for pair in active if pair[0]["algorithm"] == "muon"], bad)
            for group, params in active:
                if group["algorithm"] == "adamw" and params:
                    update_with_adamw(group, params, [self.state[p] for p in params], bad)
            if self.cap is not None:
                factor = cap_step_(active, before, self.cap)
                self._cap_factor = _placed(self._cap_factor, factor.device)
                self._cap_factor.copy_(factor)
        return loss

    def _active(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters to update now, checked."""
        check_still_matrices(group)
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ConfigError(
                    f"the gradient of {name_of(group, p)} is sparse; create the embedding with sparse=False, "
                    "or give it to torch.optim.SparseAdam"
                )
            settle_gradient_(p)
        return params

    def _muon(self, active: list[tuple[dict[str, Any], list[Tensor]]], bad: Tensor) -> None:
        """Update matrices, all of one shape and with the same settings at a time."""
        buckets: dict[Any, tuple[dict[str, Any], list[Piece]]] = {}
        ready: list[tuple[dict[str, Any], dict[str, Any], Any, dict[str, Tensor], Sequence[Tensor]]] = []
        divided: list[Divided] = []
        # All gradients before any state: compiled code would know those of parameters that it has met as keys of the
        # state by their identity, and be compiled again for the new ones of the next step.
        members = [(group, _key(group), p, p.grad) for group, params in active for p in params]
        for group, key, p, gradient in members:
            assert gradient is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = new_state(p)
            momentum = state["momentum_buffer"]
            if holds_whole_matrices(p, group["layout"]):
                ready.append((group, group, key, state, (own(p), local(gradient), local(momentum))))
            else:
                divided.append(Divided(group, p, gradient, momentum))
        keep = 1.0 if _may_look(bad) and not bad else (~bad).to(torch.float32)
        gathered = assemble(divided, keep, self.distributed)
        for (group, p, *_), stand_in in zip(divided, gathered, strict=True):
            if stand_in is not None:
                ready.append((group, stand_in.group, _key(stand_in.group), self.state[p], stand_in[1:]))
        for group, settings, key, state, tensors in ready:
            if not tensors[0].numel():
                continue  # all of it lies with other processes
            views = (matrices_in(group, t) for t in tensors)
            for i, (part, gradient, average) in enumerate(zip(*views, strict=True)):
                shape = (part.n, part.m, part.tensor.device, average.tensor.dtype)
                top = top_space_of(settings, state, i, part)
                pieces = buckets.setdefault((*shape, key), (settings, []))[1]
                pieces.extend(pieces_of(part, gradient, average, top))
        for group, pieces in buckets.values():
            for chunk in chunks(pieces):
                update_matrices(group, chunk, keep, self._space)
        scatter_(divided, [each and each.weights for each in gathered], keep, self.distributed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict, of a model in any dtype; tensors are copied.

        torch casts state to the parameter's dtype, which would cost half-precision parameters their float32 moments.

        Raises:
            CheckpointError: It is another optimizer's, or of parameters of other shapes.
            ValueError: Its groups are of other sizes.
        """
        groups = groups_to_load(state_dict["param_groups"], self.param_groups)
        state_dict = {**state_dict, "param_groups": groups}
        saved = itertools.chain.from_iterable(g["params"] for g in groups)
        own = [
            ({**group, "algorithm": loaded["algorithm"]}, p)
            for group, loaded in zip(self.param_groups, groups, strict=False)
            for p in group["params"]
        ]
        tensors = [
            (p, name, fit_state(group, p, name, value))
            for key, (group, p) in zip(saved, own, strict=False)  # unequal lengths are torch's to report
            for name, value in state_dict["state"].get(key, {}).items()
            if isinstance(value, Tensor)
        ]
        super().load_state_dict(state_dict)
        for p, name, value in tensors:
            dtype = value.dtype if name == "step" else state_dtype(p.dtype)
            self.state[p][name] = value.detach().to(p.device, dtype, copy=True).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        counts = {"_skipped": self._skipped, "_cap_factor": self._cap_factor}
        return {
            **super().__getstate__(),
            "roles": self.roles,
            "cap": self.cap,
            "nonfinite": self.nonfinite,
            "distributed": self.distributed,
            "_of_adamw": self._of_adamw,
            "_space": Workspace(),
            **counts,
        }


def _may_look(bad: Tensor) -> bool:
    """Whether a value may be read: on accelerators that would wait, and compiled code would fall apart."""
    return bad.device.type == "cpu" and not torch.compiler.is_compiling()


def _placed(value: Tensor, device: torch.device) -> Tensor:
    """A number that is kept, where the gradients are."""
    if value.device == device:
        return value
    return torch.zeros_like(value, device=device) if value.is_meta else value.to(device)


def _key(group: dict[str, Any]) -> tuple[Any, ...]:
    """What matrices must share to be updated together; a tensor (the rate) is told by its identity."""
    return tuple(id(v) if isinstance(v, Tensor) else str(v) for v in (group[name] for name in _SETTINGS))
