"""Learning rates as pure functions: the schedule over time, the factor of a shape, and the conversion between scales.

Schedule, with s the 0-based index of the step about to be taken, S the number of steps, W of them warm-up and
D of them decay, f the final fraction:

* warm-up: (s + 1) / (W + 1), so that no step is wasted on a rate of 0 and the first step after it has factor 1;
* WSD (warm-up, stable, decay): 1 until S - D, then f + (1 - f) (1 - g(t)) with t = (s - (S - D) + 1) / (D + 1)
  and g(t) = t (linear) or sqrt(t) (1-sqrt);
* cosine: f + (1 - f) (1 + cos(pi t)) / 2 with t = (s - W) / (S - W).

In both the factor reaches f at s = S, the first step that is *not* taken: the last step still learns.

Shape factor s(n, m) in front of msign for a matrix with n outputs and m inputs (post kexue.fm/archives/11416):

| name | factor | learning rate |
|---|---|---|
| moonlight | 0.2 sqrt(max(n, m)) | Adam's, unchanged: the update's RMS is 0.2 lr |
| rms | 0.2 / RMS(update) | the same, exactly, whatever the rank |
| keller | sqrt(max(1, n / m)) | about 0.2 sqrt(d) times Adam's |
| mup | sqrt(n / m) | the same; transfers across widths |
| none | 1 | the same |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from quintic.core import ConfigError, suggest

if TYPE_CHECKING:
    from quintic.optim.config import OptimConfig

__all__ = [
    "SCALES",
    "UPDATE_RMS",
    "ConvertedLr",
    "convert_lr",
    "decay_start",
    "lr_factor",
    "momentum_at",
    "scale_factor",
]

UPDATE_RMS = 0.2
"""RMS of one update per unit of learning rate under ``moonlight`` and ``rms``; Adam's is about the same."""

SCALES = ("moonlight", "rms", "keller", "mup", "none")
"""Names of shape factors."""


def scale_factor(scale: str, rows: int, columns: int) -> float:
    """The factor s(n, m) in front of msign for an (n outputs, m inputs) matrix.

    For ``rms``, whose factor depends on the update, this is its value at full rank.

    Raises:
        ConfigError: Unknown scale.

    Example:
        >>> scale_factor("moonlight", 256, 64), scale_factor("keller", 256, 64), scale_factor("mup", 64, 256)
        (3.2, 2.0, 0.5)
    """
    if scale in ("moonlight", "rms"):
        return UPDATE_RMS * math.sqrt(max(rows, columns))
    if scale == "keller":
        return math.sqrt(max(1.0, rows / columns))
    if scale == "mup":
        return math.sqrt(rows / columns)
    if scale == "none":
        return 1.0
    raise ConfigError(f"unknown scale {scale!r}{suggest(str(scale), SCALES)}")


class ConvertedLr(NamedTuple):
    """Learning rate and weight decay that give the same steps under another scale."""

    lr: float
    weight_decay: float


def convert_lr(
    lr: float, weight_decay: float, from_scale: str, to_scale: str, shape: int | tuple[int, int]
) -> ConvertedLr:
    """Learning rate and weight decay under ``to_scale`` that act on a matrix as the given ones under ``from_scale``.

    The rate is multiplied by the ratio of the factors and the decay divided by it, since weights shrink by
    lr * weight_decay per step. Exact for one shape; a model with several has one compromise, usually its width.

    Args:
        lr: Learning rate under ``from_scale``.
        weight_decay: Decoupled weight decay under ``from_scale``.
        from_scale: Name of :data:`SCALES`.
        to_scale: Name of :data:`SCALES`.
        shape: (outputs, inputs) of the matrix, or the width d of a square one.

    Raises:
        ConfigError: Unknown scale or a shape that is not positive.

    Example:
        Adam's rate for torch.optim.Muon, whose default is Keller's factor (post 11416: "x 6.4 for d = 1024"):

        >>> lr, wd = convert_lr(1e-3, 0.1, "moonlight", "keller", 1024)
        >>> round(lr, 6), round(wd, 6)
        (0.0064, 0.015625)
    """
    sides = (shape, shape) if isinstance(shape, Integral) else shape
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
        raise ConfigError(f"shape = {shape!r}; expected (outputs, inputs) or a width, in whole numbers")
    rows, columns = map(int, sides)
    if rows < 1 or columns < 1:
        raise ConfigError(f"shape {shape} has an empty side; expected (outputs, inputs) or a width")
    ratio = scale_factor(from_scale, rows, columns) / scale_factor(to_scale, rows, columns)
    return ConvertedLr(lr * ratio, weight_decay / ratio)


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """The factor on the peak rates for a step; see the formulas at the top of this file.

    Args:
        step: 0-based index of the step about to be taken. From ``total_steps`` on the factor is the final
            fraction (1 for ``constant``).
        total_steps: Number of steps of the run, at least 1.
        config: Its ``schedule``, ``warmup_fraction``, ``decay_fraction``, ``decay_shape`` and
            ``final_lr_fraction`` are used.

    Returns:
        A factor in (0, 1] for every step of the run.

    Raises:
        ConfigError: A negative step or no steps at all.
    """
    if total_steps < 1 or step < 0:
        raise ConfigError(f"step {step} of {total_steps} steps; expected 0 <= step and at least one step")
    warmup = round(config.warmup_fraction * total_steps)
    if step < min(warmup, total_steps):
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    final = config.final_lr_fraction
    if step >= total_steps:
        return final
    if config.schedule == "cosine":
        t = (step - warmup) / (total_steps - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * t))
    decay = min(round(config.decay_fraction * total_steps), total_steps - warmup)
    t = max(0.0, (step - (total_steps - decay) + 1) / (decay + 1))
    return final + (1.0 - final) * (1.0 - (math.sqrt(t) if config.decay_shape == "1-sqrt" else t))


def decay_start(total_steps: int, config: OptimConfig) -> int | None:
    """Steps that ``wsd`` takes before the rate falls: what they reach can be trained on to any length.

    Returns:
        Their number; None if there are none, or the schedule is another or has no decay.

    Example:
        >>> from quintic.optim import OptimConfig
        >>> decay_start(200, OptimConfig(decay_fraction=0.4)), decay_start(200, OptimConfig(schedule="cosine"))
        (120, None)
    """
    if config.schedule != "wsd":
        return None
    warmup = round(config.warmup_fraction * total_steps)
    decay = min(round(config.decay_fraction * total_steps), total_steps - warmup)
    return total_steps - decay if 0 < decay < total_steps else None


def momentum_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Muon's momentum for a step: linear from ``momentum_start`` to ``momentum``, then constant.

    Early gradients change fast, so that a shorter memory is better; 0.85 to 0.95 over the first 300 steps is customary
    in modded-nanogpt. The average form of the momentum makes a change of mu harmless.

    Args:
        step: 0-based index of the step about to be taken.
        total_steps: Number of steps of the run, at least 1.
        config: Its ``momentum``, ``momentum_start`` and ``momentum_warmup_fraction`` are used.

    Example:
        >>> from quintic.optim import OptimConfig
        >>> config = OptimConfig(momentum=0.95, momentum_start=0.85, momentum_warmup_fraction=0.5)
        >>> [round(momentum_at(step, 8, config), 3) for step in (0, 2, 4, 7)]
        [0.85, 0.9, 0.95, 0.95]
    """
    warmup = round(config.momentum_warmup_fraction * total_steps)
    if step >= warmup:
        return config.momentum
    return config.momentum_start + (config.momentum - config.momentum_start) * step / warmup
