"""Numbers that come out the same on every platform: exponentials and steps of the chain by exact operations only.

IEEE-754 prescribes every bit of +, -, *, / and square roots of doubles; a platform's own exp does not have to agree
with another's, nor does a vectorised one with a scalar one. Here exp is x = k log 2 + r, exp x = 2^k exp r, the last
factor a polynomial summed in a fixed order.

Noise levels in files are whole numbers of 1/256 log_snr.
"""

from __future__ import annotations

import functools
import math

__all__ = ["EXP_COEFFICIENTS", "INVERSE_LN2", "LN2", "LN2_HIGH", "LN2_LOW", "UNIT", "exact_exp", "step_coefficients"]

UNIT = 256
"""Steps of a noise level per unit of log_snr."""

INVERSE_LN2, LN2 = 1.4426950408889634, 0.6931471805599453
# The high part has 32 trailing zero bits: k times it is exact for every |k| < 2^21.
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
EXP_COEFFICIENTS = tuple(1.0 / math.factorial(i) for i in range(14, -1, -1))
"""Of exp, highest power first; |r| <= 0.35 leaves a remainder below 1e-18."""


@functools.lru_cache(1 << 12)
def exact_exp(x: float) -> float:
    """exp x for |x| <= 700 to about 1e-16.

    Example:
        >>> abs(exact_exp(-3.7) / math.exp(-3.7) - 1) < 1e-15
        True
    """
    assert abs(x) <= 700
    k = math.floor(x * INVERSE_LN2 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = 0.0
    for c in EXP_COEFFICIENTS:
        total = total * r + c
    return math.ldexp(total, k)


@functools.lru_cache(1 << 10)
def step_coefficients(level: int, following: int) -> tuple[float, float, float]:
    """Those of :func:`quintic.diffusion.reverse_step`, exactly reproducible.

    Args:
        level: Noise level at hand, in 1/256 of log_snr.
        following: The one after the step, larger.

    Returns:
        (a, b, std) of ``a x + b x_0 + std z``.
    """
    assert following > level
    s, t = level / UNIT, following / UNIT
    ratio = exact_exp(s - t)
    alpha_s = math.sqrt(1.0 / (1.0 + exact_exp(-s)))
    alpha_t = math.sqrt(1.0 / (1.0 + exact_exp(-t)))
    sigma_t = math.sqrt(1.0 / (1.0 + exact_exp(t)))
    return ratio * alpha_t / alpha_s, alpha_t * (1.0 - ratio), sigma_t * math.sqrt(1.0 - ratio)
