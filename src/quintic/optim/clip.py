"""Gradient clipping: by the global norm, matrix by matrix, or by what norms have been lately.

* global: g <- g * min(1, c / ||g||), ||g|| over all parameters together. Post kexue.fm/archives/10657 argues why
  c = 1 is a good default: dL is about -lr ||g||^2 under gradient descent and less than lr in late training.
* spectral: every matrix G by itself, G <- G * min(1, c / sigma_1(G)); a vector by its Euclidean norm.
* adaptive: global, with c = the q-quantile of recent norms, so that about a share 1 - q of the steps is clipped.
  "c is sensible if most norms are below it and few above" (the same post) holds by construction.
* none: only measures.

Norms neither overflow nor underflow (:mod:`quintic.optim.norms`): float32 gradients of 1e20, whose squares overflow,
are clipped and not zeroed. No synchronisation with the device takes place, except that the eigenvalues of spectral
clipping wait for a GPU, and so does ``nonfinite="raise"``.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quintic.core import CheckpointError, ConfigError, QuinticError, suggest
from quintic.optim.norms import global_norm, scaled_norm, spectral_norms
from quintic.optim.routing import roles
from quintic.optim.sharded import agree_on_any, local, own_part, settle_gradient_, whole
from quintic.optim.split import parts_of

__all__ = [
    "CLIPPING",
    "ClipResult",
    "GradientClipping",
    "NonFiniteGradientError",
    "clip_grad_norm_",
    "clip_grad_spectral_",
]

CLIPPING = ("global", "spectral", "adaptive", "none")
"""Kinds of :class:`GradientClipping`."""

_NONFINITE = ("keep", "zero", "raise")

Parameters = nn.Module | Tensor | Iterable[Tensor]


class NonFiniteGradientError(QuinticError, FloatingPointError):
    """A gradient is NaN or infinite, and ``nonfinite="raise"``; the message names the parameters."""


class ClipResult(NamedTuple):
    """What :class:`GradientClipping` found and did; 0-d tensors on the gradients' device, read when one likes."""

    norm: Tensor
    """Global norm before clipping, float64 where the device has it; NaN or infinite if a gradient is."""
    scale: Tensor
    """Factor applied to every gradient, in spectral clipping the smallest one: 1 when nothing was clipped."""
    clipped: Tensor
    """bool: the norm (of some matrix) was finite and above the threshold."""
    finite: Tensor
    """bool: every gradient was finite. If not, nothing was clipped: skip the step."""
    fraction: Tensor
    """Share of the matrices and vectors that were scaled; with a global norm 0 or 1."""
    threshold: Tensor
    """The norm from which on this call clips."""


def clip_grad_norm_(parameters: Parameters, max_norm: float | Tensor = 1.0, *, nonfinite: str = "keep") -> Tensor:
    """Scale the gradients of all parameters in place so that their global norm is at most ``max_norm``.

    A drop-in for ``torch.nn.utils.clip_grad_norm_``, which takes a module as well. Unlike there, gradients that are not
    finite are left alone instead of multiplied by NaN, the norm of float32 gradients does not overflow, and that of
    divided ones (DTensor) is a plain number.

    Args:
        parameters: A module, a tensor or tensors; those without a gradient are passed over, and one that is
            listed twice counts and is scaled once.
        max_norm: The threshold, above 0; a number or a 0-d tensor, which is not read. ``float("inf")`` only measures.
        nonfinite: What happens if a gradient is NaN or infinite, or the norm too large for float64. ``keep``
            leaves all gradients as they are, ``zero`` sets all of them to 0, ``raise`` raises an error.

    Returns:
        The global norm before clipping, 0-d, float64 where the device has it; NaN or infinite if a gradient is. What
        else was found and done is told by :class:`GradientClipping`.

    Raises:
        ConfigError: ``max_norm`` is not positive, a gradient is sparse or complex, the policy is unknown, or the
            parameters are divided in a way of which no norm is known.
        NonFiniteGradientError: With ``nonfinite="raise"``.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> norm = clip_grad_norm_(w)
        >>> f"{norm:.2f}", w.grad
        ('5.00', tensor([0.6000, 0.8000]))
    """
    return _clip_together(parameters, max_norm, nonfinite).norm


@torch.no_grad()
def _clip_together(parameters: Parameters, max_norm: float | Tensor, nonfinite: str) -> ClipResult:
    """By the global norm."""
    _check(max_norm, nonfinite)
    named = _named_gradients(parameters)
    norm = global_norm(g for _, g in named)
    threshold = torch.as_tensor(max_norm, dtype=norm.dtype, device=norm.device)
    finite = norm.isfinite()
    clipped = finite & (norm > threshold)
    scale = torch.where(clipped, threshold / norm, 1.0)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, g in named:
        by_kind.setdefault((g.device, g.dtype), []).append(local(g))
    for (device, dtype), group in by_kind.items():
        # Half precision is multiplied by a float32 number, whose range does not lose a small scale.
        torch._foreach_mul_(group, scale.to(device, dtype if dtype == torch.float64 else torch.float32))
    _handle_nonfinite(named, finite, nonfinite)
    return ClipResult(norm, scale, clipped, finite, clipped.to(norm.dtype), threshold)


def clip_grad_spectral_(parameters: Parameters, max_norm: float = 1.0, *, nonfinite: str = "keep") -> Tensor:
    """Scale each gradient matrix in place so that its largest singular value is at most ``max_norm``.

    Unlike with the global norm, one exploding matrix leaves the others their size. Given a module, tensors are
    read as matrices as :func:`quintic.optim.roles` says (stacks per slice, fused projections per part,
    convolutions as (out, in * kernel)). Given tensors, 3-D ones are stacks and those with more axes convolutions.
    Vectors are clipped by their Euclidean norm.

    Costs a Gram matrix and its eigenvalues: with n the shorter side of (n, m), 2 n^2 m + about 4/3 n^3 flops. The
    product is a tenth of Muon's five Newton-Schulz steps, but eigenvalues are slow: at width 128 on one CPU core the
    whole took 0.8 of the time of Muon's step (global clipping: 0.08).
    Power iteration would be cheaper, but it is a lower bound, and the norm after clipping would exceed the threshold.

    Args:
        parameters: As for :func:`clip_grad_norm_`.
        max_norm: The threshold of every matrix, above 0.
        nonfinite: As for :func:`clip_grad_norm_`.

    Returns:
        The global norm before clipping, as :func:`clip_grad_norm_`. How many matrices were scaled is told by
        ``GradientClipping("spectral")``.

    Raises:
        ConfigError: As for :func:`clip_grad_norm_`.
        NonFiniteGradientError: With ``nonfinite="raise"``.

    Example:
        >>> a, b = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
        >>> a.grad, b.grad = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2) / 2
        >>> norm = clip_grad_spectral_([a, b])
        >>> a.grad, b.grad
        (tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]]), tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]))
    """
    return _clip_apart(parameters, max_norm, nonfinite).norm


@torch.no_grad()
def _clip_apart(parameters: Parameters, max_norm: float, nonfinite: str) -> ClipResult:
    """Matrix by matrix."""
    _check(max_norm, nonfinite)
    named = _named_gradients(parameters)
    norm = global_norm(g for _, g in named)
    finite = norm.isfinite()
    threshold = torch.as_tensor(max_norm, dtype=norm.dtype, device=norm.device)
    module = isinstance(parameters, nn.Module)
    reading = {row.name: (row.layout, row.split, row.orientation) for row in roles(parameters)} if module else {}
    factors = []
    for name, g in named:
        if not g.numel():
            continue
        layout, split, orientation = reading.get(name, (None, None, "out_in"))
        # What is not under Muon has no layout: with more than two axes (of bare tensors, three) it is a convolution.
        layout = layout or ("vector" if g.ndim < 2 else "conv" if g.ndim > (2 if module else 3) else "stack")
        divided, g = g, whole(local(g), g)
        for view, matrices, n, m in parts_of(g, layout, split, orientation):
            norms = scaled_norm(g).reshape(1) if layout == "vector" else spectral_norms(view.reshape(matrices, n, m))
            limit = threshold.to(norms.device, norms.dtype)
            factor = torch.where(finite.to(norms.device) & (norms > limit), limit / norms, 1.0)
            wide = factor.to(torch.float64 if g.dtype == torch.float64 else torch.float32)
            view.mul_(wide[:, None, None].expand(matrices, n, m).reshape(view.shape))  # a view, as it only splits axes
            factors.append(factor.to(norm.device, norm.dtype))
        if g is not divided:
            local(divided).copy_(own_part(g, divided))
    _handle_nonfinite(named, finite, nonfinite)
    every = torch.cat(factors) if factors else torch.ones(1, dtype=norm.dtype, device=norm.device)
    scaled = (every < 1).to(norm.dtype).mean()
    return ClipResult(norm, every.min(), scaled > 0, finite, scaled, threshold)


class GradientClipping:
    """One of the rules above for every step of a run, with a memory of recent norms.

    Args:
        kind: ``global``, ``spectral``, ``adaptive`` or ``none``.
        max_norm: The threshold; for ``adaptive`` an upper bound on it, ``inf`` for none; unused by ``none``.
        quantile: Of ``adaptive``: which quantile of recent norms is the threshold, in (0, 1). It takes part once
            1 / (1 - quantile) norms are known; until then, and while it is 0, the threshold is ``max_norm``.
        window: How many finite norms are remembered; norms are recorded before clipping, else the threshold
            could only fall.
        nonfinite: As for :func:`clip_grad_norm_`.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> w = torch.zeros(1, requires_grad=True)
        >>> clip = GradientClipping("adaptive", max_norm=float("inf"), quantile=0.5, window=4)
        >>> for value in (1.0, 2.0, 3.0, 100.0):
        ...     w.grad = torch.tensor([value])
        ...     result = clip(w)
        >>> float(result.threshold), float(w.grad), clip.norms, clip.clip_fraction
        (2.0, 2.0, [1.0, 2.0, 3.0, 100.0], 0.5)
    """

    def __init__(
        self,
        kind: str = "global",
        max_norm: float = 1.0,
        *,
        quantile: float = 0.9,
        window: int = 100,
        nonfinite: str = "keep",
    ) -> None:
        if kind not in CLIPPING:
            raise ConfigError(f"unknown kind of clipping {kind!r}{suggest(str(kind), CLIPPING)}")
        _check(max_norm, nonfinite)
        if not 0 < quantile < 1:
            raise ConfigError(f"quantile = {quantile}; expected a number between 0 and 1, such as 0.9")
        self._needed = math.ceil(1 / (1 - quantile) - 1e-9)
        if window < self._needed:
            raise ConfigError(
                f"window = {window} norms are too few for the {quantile} quantile; expected at least {self._needed}"
            )
        self.kind = kind
        self.max_norm = max_norm if kind != "none" else math.inf
        self.quantile = quantile
        self.nonfinite = nonfinite
        self.steps = 0
        """Calls so far."""
        self._norms = torch.full(
            (window,), math.nan, dtype=torch.float64, device="cpu"
        )  # newest last; NaN: not known yet
        self._clipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._nonfinite = torch.zeros((), dtype=torch.int64, device="cpu")

    def __call__(self, parameters: Parameters) -> ClipResult:
        """Clip the gradients in place, record the norm, and return what was found and done."""
        if self.kind == "spectral":
            result = _clip_apart(parameters, self.max_norm, self.nonfinite)
        else:
            result = _clip_together(parameters, self.threshold, self.nonfinite)
        self.steps += 1
        norm, finite = result.norm, result.finite
        old = self._norms.to(norm.device, norm.dtype)
        self._norms = torch.where(finite, torch.cat([old[1:], norm.reshape(1)]), old)
        self._clipped = self._clipped.to(norm.device) + result.clipped
        self._nonfinite = self._nonfinite.to(norm.device) + ~finite
        return result

    def __repr__(self) -> str:
        of_norms = f", quantile={self.quantile:g}, window={len(self._norms)}" if self.kind == "adaptive" else ""
        return f"GradientClipping({self.kind!r}, max_norm={float(self.max_norm):g}{of_norms})"

    @property
    def threshold(self) -> Tensor:
        """The norm from which on the next call will clip, 0-d."""
        bound = torch.as_tensor(self.max_norm, dtype=self._norms.dtype, device=self._norms.device)
        if self.kind != "adaptive":
            return bound
        level = torch.nanquantile(self._norms, self.quantile)
        usable = (self._norms.isfinite().sum() >= self._needed) & (level > 0)
        return torch.where(usable, torch.minimum(level, bound), bound)

    @property
    def norms(self) -> list[float]:
        """Recent finite norms before clipping, oldest first. Reading waits for the device."""
        return self._norms[self._norms.isfinite()].tolist()

    @property
    def clip_fraction(self) -> float:
        """Share of the calls in which something was clipped. Reading waits for the device."""
        return int(self._clipped) / self.steps if self.steps else 0.0

    @property
    def nonfinite_steps(self) -> int:
        """How often a gradient was not finite. Reading waits for the device."""
        return int(self._nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON: ``steps``, ``clipped``, ``nonfinite`` and the recent ``norms``."""
        return {
            "steps": self.steps,
            "clipped": int(self._clipped),
            "nonfinite": int(self._nonfinite),
            "norms": self.norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, also of another kind; of a longer window the newest norms are kept.

        Raises:
            CheckpointError: The state is not one of gradient clipping.
        """
        if missing := {"steps", "clipped", "nonfinite", "norms"} - state.keys():
            raise CheckpointError(f"this is not the state of gradient clipping: it has no {', '.join(sorted(missing))}")
        self.steps = int(state["steps"])
        self._clipped = torch.tensor(int(state["clipped"]), device="cpu")
        self._nonfinite = torch.tensor(int(state["nonfinite"]), device="cpu")
        window = len(self._norms)
        known = [float(norm) for norm in state["norms"]][-window:]
        self._norms = torch.tensor([math.nan] * (window - len(known)) + known, dtype=torch.float64, device="cpu")


def _check(max_norm: float | Tensor, nonfinite: str) -> None:
    if not isinstance(max_norm, Tensor) and not (isinstance(max_norm, Real) and max_norm > 0):
        raise ConfigError(f"max_norm = {max_norm!r}; expected a positive number (inf only measures)")
    if nonfinite not in _NONFINITE:
        raise ConfigError(f"unknown nonfinite {nonfinite!r}{suggest(str(nonfinite), _NONFINITE)}")


def _named_gradients(parameters: Parameters) -> list[tuple[str, Tensor]]:
    """Each gradient once, under its parameter's name or place in the list."""
    if isinstance(parameters, nn.Module):
        named = parameters.named_parameters()
    else:
        listed = [parameters] if isinstance(parameters, Tensor) else parameters
        named = ((f"parameter {i}", p) for i, p in enumerate(listed))
    found: dict[int, tuple[str, Tensor]] = {}
    for name, p in named:
        if not isinstance(p, Tensor):
            raise ConfigError(f"cannot clip {type(p).__name__}; expected tensors: pass the module or its parameters()")
        settle_gradient_(p)
        if p.grad is None:
            continue
        if p.grad.is_complex():
            raise ConfigError(f"the gradient of {name} is of {p.grad.dtype}; leave its parameter out of clipping")
        if p.grad.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {name} is sparse; use Embedding(sparse=False), or leave its parameter out of clipping"
            )
        found.setdefault(id(p.grad), (name, p.grad))
    return list(found.values())


def _handle_nonfinite(named: list[tuple[str, Tensor]], finite: Tensor, policy: str) -> None:
    if policy == "zero":
        for _, g in named:
            local(g).masked_fill_(~finite.to(g.device), 0.0)
    elif policy == "raise" and not finite:
        here = [local(g) for _, g in named]
        flags = [g.numel() > 0 and not bool(scaled_norm(g).isfinite()) for g in here]
        flags = agree_on_any(torch.tensor(flags, device=finite.device), [g for _, g in named])
        bad = [name for (name, _), flag in zip(named, flags.tolist(), strict=True) if flag]
        where = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NonFiniteGradientError(
            f"the gradient is not finite: {where or 'all parameters together'}; nothing was clipped. "
            "Lower the learning rate or lengthen the warm-up; nonfinite='keep' leaves such a step to the optimizer"
        )
