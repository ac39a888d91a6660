"""The reverse chain that encoder and decoder both run: the only place where an image comes about.

    x_T fixed;   at level l_i:  x_0 = clip(denoise(x));   x <- a x + b x_0 + std z_i;   the last x_0 is the image

At levels where the plan does not call the denoiser, x_0 is moved on by :class:`quintic.codec.between.Between`.

With T levels there are T - 1 noises z_i, each from its code. The encoder asks ``choose`` for the code of a step and
goes on from it just as the decoder does: what one makes, the other makes too, bit for bit, provided that the denoiser
answers alike. For that it is called with one image at a time, whose answer cannot depend on its neighbours in a batch;
exact arithmetic (:mod:`quintic.codec.exact`) has no such dependence and takes batches.

x and z change by elementwise operations only, float64 or, in plans that say so, float32; the denoiser sees float32.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quintic.codec.arithmetic import UNIT, step_coefficients
from quintic.codec.between import Between, Errors
from quintic.codec.codebook import Array, Codebook, precision, start_noise
from quintic.codec.curve import Curve
from quintic.codec.exact import ExactArithmetic
from quintic.codec.schedule import Plan
from quintic.codec.selection import Ids, Single
from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.diffusion.denoiser import Denoiser

__all__ = ["Choose", "Direction", "First", "aim", "replay", "run_chain"]

First = tuple[int, int, bool]
"""Seed, level and whether in exact arithmetic: what a first prediction depends on besides the denoiser."""

Direction = Callable[[NDArray[np.float32], NDArray[np.float32], float], "NDArray[np.floating]"]
"""Predictions (n, c, h, w), the noisy images they were made from, and log_snr, to what the shift should point along, of
the same shape: x_0 minus the prediction, to compress. The score of an atom is its inner product with that."""
Choose = Callable[[int, NDArray[np.float32], Array, Codebook], "Ids | None"]
"""Step, predictions (n, c, h, w), noisy images (n, d), codebook of the step, to symbols; None ends the chain."""


_DEVICES = ("cpu", "cuda")
_FIRSTS = 16  # files of presets need two; plans in files may have any seed


@torch.no_grad()
def run_chain(
    denoiser: Denoiser,
    plan: Plan,
    count: int,
    choose: Choose,
    *,
    curve: Curve | None = None,
    exact: bool = False,
    batch: int = 1,
    kept: dict[First, NDArray[np.float32]] | None = None,
) -> NDArray[np.float32]:
    """Run the chain for some images.

    Args:
        denoiser: The model.
        plan: Levels, codebooks and rules.
        count: Images, all of the model's shape.
        choose: Gives the symbols of each step.
        curve: Of the model, with residuals; for plans with fewer calls than levels.
        exact: Use exact arithmetic in the denoiser.
        batch: Images per call. More than 1 is quicker, but without exact arithmetic an image's last bits then depend
            on its neighbours.
        kept: First predictions of this denoiser: the start noise is the same for all images, so that one call serves
            every chain that is given the same dictionary.

    Returns:
        (count, c, h, w) in [-1, 1].
    """
    c, h, w = denoiser.shape
    d = c * h * w
    number = precision(plan.single)
    x = np.repeat(start_noise(plan.seed, d)[None].astype(number), count, axis=0)
    shared: dict[int, Codebook] = {}
    called = set(range(len(plan.levels)) if plan.called is None else plan.called)
    moving = len(called) < len(plan.levels)
    if moving and (curve is None or curve.residuals is None):
        raise ConfigError(
            "a plan with fewer calls than levels needs the model's residuals; see quintic.codec.calibrate"
        )
    errors = (
        Errors.of(curve, denoiser.shape, tuple(plan.levels[step] for step in sorted(called)), plan.single)
        if moving and curve is not None
        else None
    )
    between: Between | None = None
    firsts = {} if kept is None else kept

    def predict(step: int, *, last: bool = False) -> NDArray[np.float32]:
        nonlocal between
        level = plan.levels[step]
        if step not in called and not last:
            assert between is not None
            return between.predict(x, level)
        if step == 0:
            key = plan.seed, level, exact
            if key not in firsts:
                if len(firsts) >= _FIRSTS:
                    firsts.clear()
                firsts[key] = _predict(denoiser, x[:1].reshape(1, c, h, w), level, exact, batch)
            x0 = np.repeat(firsts[key], count, axis=0)
        else:
            x0 = _predict(denoiser, x.reshape(count, c, h, w), level, exact, batch)
        if errors is not None and step + 1 not in called and step + 1 < len(plan.levels) and not last:
            between = Between(errors, x0, x, level)
        return x0

    x0 = predict(0)
    for step, (level, following) in enumerate(itertools.pairwise(plan.levels)):
        rule = plan.step_rule(step)
        if rule is None:
            z = Stream(plan.seed, "codec step without a code", step).normal(0, d)[None].astype(number)
        else:
            book = plan.step_book(step, d, shared)
            ids = choose(step, x0, x, book)
            if ids is None:
                return x0 if step in called else predict(step, last=True)
            z = rule.noise(ids, book)
        a, b, std = step_coefficients(level, following)
        x = a * x
        x += b * x0.reshape(count, d).astype(number, copy=False)
        x += std * z
        x0 = predict(step + 1)
    return x0


def aim(plan: Plan, direction: Direction, record: list[Ids], *, draw: str = "argmax", seed: int = 0) -> Choose:
    """An encoder's choice: the symbols whose noise carries ``b / std * direction``.

    Args:
        plan: As for the chain.
        direction: What to move along.
        record: Receives the symbols (n, symbols) of every step in turn, (n, 0) of one without a code.
        draw: For plans of single atoms: argmax, softmax or literal.
        seed: Of the draws.
    """
    if draw != "argmax" and plan.rule != "single":
        raise ConfigError(f"selection {draw!r} is for plans with rule single, this one has {plan.rule!r}")

    def choose(step: int, x0: NDArray[np.float32], x: Array, book: Codebook) -> Ids:
        while len(record) < step:
            record.append(np.zeros((len(x0), 0), dtype=np.int64))
        _, b, std = step_coefficients(plan.levels[step], plan.levels[step + 1])
        towards = direction(x0, x.reshape(x0.shape).astype(np.float32, copy=False), plan.levels[step] / UNIT)
        wanted = (b / std) * np.asarray(towards, dtype=precision(plan.single))
        rule = Single(draw) if plan.rule == "single" else plan.step_rule(step)
        assert rule is not None
        draws = None if draw == "argmax" else Stream(seed, "selection", step)
        ids = rule.choose(wanted.reshape(len(x0), -1), book, draws)
        record.append(ids)
        return ids

    return choose


def replay(plan: Plan, codes: Sequence[Ids]) -> Choose:
    """A decoder's choice: symbols by step; the chain ends where they do."""

    def choose(step: int, x0: NDArray[np.float32], x: Array, book: Codebook) -> Ids | None:
        return codes[step] if step < len(codes) else None

    return choose


def _predict(denoiser: Denoiser, x: Array, level: int, exact: bool, batch: int) -> NDArray[np.float32]:
    # Autocast around an encoder would make files that no decoder without it can follow.
    if any(torch.is_autocast_enabled(device) for device in _DEVICES):
        with contextlib.ExitStack() as full:
            for device in _DEVICES:
                full.enter_context(torch.autocast(device, enabled=False))
            return _predict(denoiser, x, level, exact, batch)
    with ExactArithmetic() if exact else contextlib.nullcontext():
        shown = torch.from_numpy(x.astype(np.float32, copy=False))
        parts = [
            denoiser.predict_x0(part, level / UNIT) for part in (shown.split(batch) if len(x) > batch else [shown])
        ]
        said = torch.cat(parts) if len(parts) > 1 else parts[0]
        return said.float().clamp(-1.0, 1.0).numpy()
