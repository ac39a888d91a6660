"""Inverting a block exactly: one family of methods from token by token to all tokens at once.

The inverse is the fixed point x = G(x) with G(x)_{i+1} = z_{i+1} exp(alpha(x_{<=i})) + mu(x_{<=i}), a nonlinear
recurrence (within a token too, if the block has :mod:`quintic.flow.inner`: its numbers always come one after the
other). A sweep of Jacobi evaluates G at a guess in one parallel pass. G is strictly causal, so every sweep makes at
least one more token final, and a guess that no longer moves makes all behind it final at once. Here the final tokens
are a frozen prefix with cached keys and values, and a sweep covers the ``window`` tokens behind it:

    window 1 is the sequential inverse, window n full Jacobi, between them lies Gauss-Seidel-Jacobi
    (arXiv 2505.12849, 2505.24791, without their clamps, caps and loose thresholds: nothing here is approximate).

A block inverted by guesses is checked by one parallel pass of the model's own weights: it must return z. If it does
not, the block is inverted again token by token; if it does not even then, that is said: its map is too steep for the
precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.flow.folded import FoldedBlock, Room
from quintic.flow.guidance import Guidance
from quintic.flow.precision import full_precision

if TYPE_CHECKING:
    from quintic.flow.block import FlowBlock
    from quintic.flow.guess import LinearGuess
    from quintic.flow.planning import SamplingPlan
    from quintic.flow.tarflow import TarFlow

__all__ = ["BlockReport", "Inversion", "Tolerance", "Workspace", "invert_block", "invert_flow", "step_", "sweep_"]

_LARGE = 1e6
"""No guess is kept beyond it."""


@dataclass(frozen=True)
class Tolerance:
    """How near is equal, relative to 1 + |value|."""

    guess: float
    """A guess that moves less has settled."""
    certificate: float
    """How well the parallel pass must return z."""

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tolerance:
        """Suited to float32 or float64."""
        return cls(1e-13, 1e-9) if dtype == torch.float64 else cls(3e-6, 1e-3)


@dataclass(frozen=True)
class BlockReport:
    """How one block was inverted."""

    block: int
    window: int
    """Tokens of a sweep; 1 is sequential."""
    sweeps: int
    residual: float | None
    """Largest |f(x) - z| / (1 + |z|) of the parallel check; None if it was sequential and not checked."""
    finished_sequentially: bool
    """Whether the check failed and the block was inverted again."""


@dataclass(frozen=True)
class Inversion:
    """Tokens and what vouches for them."""

    tokens: Tensor
    """(b, n, d) in the image's order."""
    blocks: tuple[BlockReport, ...]
    """In the order of sampling; empty if sampling was one parallel pass."""

    @property
    def residual(self) -> float | None:
        """The largest residual that was measured; None if nothing was checked (sequential, without ``certify``)."""
        return max((r.residual for r in self.blocks if r.residual is not None), default=None)


class Workspace:
    """Room for keys and values of one batch, and who is with and without class in it.

    Args:
        model: The flow.
        rows: (b,) of its class tables, or None.
        guidance: If it has a weight, the batch goes through twice, side by side.
    """

    def __init__(self, model: TarFlow, batch: int, rows: Tensor | None, guidance: Guidance | None) -> None:
        self.guidance = guidance if guidance is not None and guidance.weight else None
        self.rows = rows
        self.batch = batch
        arguments = model.arguments
        heads = arguments["width"] // arguments["head_width"]
        weight = model.stack[0].position
        both = batch * (2 if self.guidance else 1)
        self.room = Room(arguments["layers"], both, heads, model.tokens, arguments["head_width"], weight)
        self.mask = torch.ones(model.tokens, model.tokens, dtype=torch.bool, device=weight.device).tril()
        self.weights = weight.new_empty(0)
        if self.guidance:
            self.weights = self.guidance.weights(1, model.tokens, model.tokens).to(weight)[:, None]
        self.unlabelled = None if rows is None else torch.full_like(rows, model.num_classes)

    def fold(self, block: FlowBlock) -> FoldedBlock:
        """A block's weights over this room."""
        rows, temperature = self.rows, 1.0
        if self.guidance:
            rows = None if rows is None or self.unlabelled is None else torch.cat([rows, self.unlabelled])
            temperature = self.guidance.temperature
        return FoldedBlock(block, rows, self.room, self.mask, temperature)

    def fresh(self, folded: FoldedBlock, x: Tensor, start: int, z: Tensor, out: Tensor | None = None) -> Tensor:
        """x of the tokens behind the given ones, from their z, (b, k, d) or (b, d) if it is one, guided."""
        read = folded.step if x.ndim == 2 else folded.read
        if not self.guidance:
            return folded.solve(z, read(x, start), None, out)
        weights = self.weights.narrow(0, start, 1 if x.ndim == 2 else x.shape[1])
        combine = partial(self._combine, self.guidance, weights)
        return folded.solve(z, read(torch.cat([x, x]), start), combine, out)

    def _combine(
        self, guidance: Guidance, weights: Tensor, mu: Tensor, alpha: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        both = None if alpha is None else (alpha[: self.batch], alpha[self.batch :])
        return guidance.combine((mu[: self.batch], mu[self.batch :]), both, weights)

    def residual(self, block: FlowBlock, x_bnd: Tensor, z_bnd: Tensor) -> float:
        """Largest |f(x) - z| / (1 + |z|) over finite images, by one parallel pass of the model itself, guided."""
        mu, alpha = block.coefficients(x_bnd[:, :-1], self.rows, own=x_bnd[:, 1:])
        if self.guidance:
            mu_u, alpha_u = block.coefficients(
                x_bnd[:, :-1], self.unlabelled, self.guidance.temperature, own=x_bnd[:, 1:]
            )
            both = None if alpha is None or alpha_u is None else (alpha, alpha_u)
            mu, alpha = self.guidance.combine((mu, mu_u), both, self.weights)
        rest = x_bnd[:, 1:] - mu
        if alpha is not None:
            rest = rest * torch.exp(-alpha)
        target = z_bnd[:, 1:]
        error = ((rest - target).abs() / (1.0 + target.abs())).flatten(1).amax(1)
        finite = x_bnd.flatten(1).isfinite().all(1)
        return float(error[finite].nan_to_num(torch.inf).max()) if finite.any() else 0.0


def invert_block(
    workspace: Workspace,
    folded: FoldedBlock,
    z_bnd: Tensor,
    window: int,
    tolerance: float,
    guess: Tensor | None = None,
) -> tuple[Tensor, list[int]]:
    """Invert one block.

    Args:
        workspace: Room for this batch.
        folded: The block's weights over that room.
        z_bnd: (b, n, d) in the block's order; left as it is.
        window: Tokens of a sweep, at least 1.
        tolerance: A guess that moves less, relative to 1 + its size, has settled.
        guess: Of x, in the block's order, where sweeps begin; None begins from z.

    Returns:
        x (b, n, d) in the block's order, and the number of tokens of every sweep.
    """
    last = z_bnd.shape[1] - 1
    x = z_bnd.clone()
    if window == 1:
        places = x.unbind(1)
        for token in range(last):
            step_(workspace, folded, places, token)
        return x, [1] * last
    if guess is not None:
        x[:, 1:] = torch.where(guess[:, 1:].abs() < _LARGE, guess[:, 1:], x[:, 1:])
    done = 0
    widths = []
    while done < last:
        end = min(done + window, last)
        widths.append(end - done)
        done = sweep_(workspace, folded, x, z_bnd, done, end, tolerance)
    return x, widths


def step_(workspace: Workspace, folded: FoldedBlock, places: Sequence[Tensor], token: int) -> None:
    """Turn token ``token + 1`` from z to x, in place, the tokens up to ``token`` being x already; each is (b, d)."""
    place = places[token + 1]
    workspace.fresh(folded, places[token], token, place, out=place)


def sweep_(
    workspace: Workspace, folded: FoldedBlock, x_bnd: Tensor, z_bnd: Tensor, done: int, end: int, tolerance: float
) -> int:
    """Compute tokens ``done + 1`` to ``end`` of x, in place, from those up to ``done``, which are final, and guesses.

    Returns:
        The last token that is final now.
    """
    given, z = x_bnd.narrow(1, done, end - done), z_bnd.narrow(1, done + 1, end - done)
    fresh = workspace.fresh(folded, given, done, z)
    place = x_bnd.narrow(1, done + 1, end - done)
    if end - done == 1:
        place.copy_(fresh)
        return end
    moved = (fresh - place).abs() - tolerance * fresh.abs()
    # A comparison with NaN is false: what is not finite has not settled.
    settled = (moved.amax((0, 2)) <= tolerance).tolist()
    final = settled.index(False) + 1 if False in settled else end - done
    place[:, :final] = fresh[:, :final]
    # A masked key still spoils a sum if it is not finite, so guesses are kept finite.
    guesses, plain = fresh[:, final:], z_bnd[:, done + 1 + final : end + 1]
    place[:, final:] = torch.where(guesses.abs() < _LARGE, guesses, plain)
    return done + final


def windows_of(method: str, blocks: int, tokens: int) -> tuple[int, ...]:
    """Window of every block by the name of a method.

    Raises:
        ConfigError: No method has that name.
    """
    if method == "sequential":
        return (1,) * blocks
    if method == "jacobi":
        return (tokens - 1,) * blocks
    kind, _, number = method.partition(":")
    if kind == "window" and number.isdigit() and int(number) >= 1:
        return (min(int(number), tokens - 1),) * blocks
    raise ConfigError(f"unknown method {method!r}; expected auto, sequential, jacobi or window:K with a number K")


def invert_flow(
    model: TarFlow,
    z_bnd: Tensor,
    rows: Tensor | None,
    *,
    method: str | SamplingPlan = "auto",
    guidance: Guidance | None = None,
    certify: bool = False,
    tolerance: Tolerance | None = None,
    guess: LinearGuess | None = None,
    check: Callable[[], None] = lambda: None,
) -> Inversion:
    """Invert all blocks, last to first.

    Args:
        model: A flow whose direction is ``density``.
        z_bnd: (b, n, d) latent tokens in the image's order; left as they are.
        rows: (b,) of the class tables, or None.
        method: ``auto``, ``sequential``, ``jacobi``, ``window:K`` or a plan.
        guidance: Towards the class.
        certify: Check sequential blocks too.
        tolerance: Of guesses and of the check; None is :meth:`Tolerance.of` the weights' precision.
        guess: Where guesses begin; None begins from the latents.
        check: Called before every block; what it raises ends the inversion.

    Raises:
        ConfigError: Unknown method, a plan for another number of blocks, or weights in half precision.
    """
    blocks = model.stack
    weight = blocks[0].position
    tolerance = tolerance or Tolerance.of(weight.dtype)
    if not len(z_bnd):
        return Inversion(z_bnd, ())
    if method == "auto":
        from quintic.flow.planning import plan_for

        method = plan_for(model, len(z_bnd), rows, guidance)
    windows = windows_of(method, len(blocks), model.tokens) if isinstance(method, str) else method.windows
    if len(windows) != len(blocks):
        raise ConfigError(f"this plan is for {len(windows)} blocks, the flow has {len(blocks)}")
    with torch.inference_mode(), full_precision(weight):
        x, reports = _invert(model, z_bnd.to(weight), rows, windows, guidance, certify, tolerance, guess, check)
    _warn_about_failures(reports, tolerance, weight.dtype)
    return Inversion(x.clone(), reports)  # a tensor that autograd may use


def _warn_about_failures(reports: tuple[BlockReport, ...], tolerance: Tolerance, dtype: torch.dtype) -> None:
    """Nothing is returned silently that was checked and failed: once for all blocks, by the worst."""
    checked = [(report.residual, report.block) for report in reports if report.residual is not None]
    residual, block = max(checked, default=(0.0, 0))
    if residual > tolerance.certificate:
        wider = "; sample in float64: flow.double()" if dtype != torch.float64 else ""
        warnings.warn(
            f"block {block} maps what was found back to its latents only within {residual:.1e}, expected "
            f"{tolerance.certificate:.0e}, even token by token: it is too steep for {dtype}{wider}",
            stacklevel=5,  # the line that calls decode
        )


def _invert(
    model: TarFlow,
    x: Tensor,
    rows: Tensor | None,
    windows: tuple[int, ...],
    guidance: Guidance | None,
    certify: bool,
    tolerance: Tolerance,
    guess: LinearGuess | None,
    check: Callable[[], None],
) -> tuple[Tensor, tuple[BlockReport, ...]]:
    workspace, blocks = Workspace(model, len(x), rows, guidance), model.stack
    reports = []
    for index in reversed(range(len(blocks))):
        check()
        block, window = blocks[index], windows[index]
        folded = workspace.fold(block)
        z = block.ordered(x)
        start = guess(index, z) if guess is not None and window > 1 else None
        found, widths = invert_block(workspace, folded, z, window, tolerance.guess, start)
        residual, failed = None, False
        if window > 1 or certify:
            residual = workspace.residual(block, found, z)
            failed = window > 1 and not residual <= tolerance.certificate
            if failed:
                found, more = invert_block(workspace, folded, z, 1, tolerance.guess)
                widths += more
                residual = workspace.residual(block, found, z)
        reports.append(BlockReport(index, window, len(widths), residual, failed))
        x = block.ordered(found)
    return x, tuple(reports)
