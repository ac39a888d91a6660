"""Polynomial schedules for the matrix sign: p_T o ... o p_1 with p_t(x) = a_t x + b_t x^3 + c_t x^5.

msign replaces every singular value by 1. A schedule of T triples (a, b, c) does so approximately with
matrix products alone: sigma -> p_T(...p_1(sigma)), for sigma in [0, 1] after division by the Frobenius norm.

Posts: kexue.fm/archives/10592 (why a quintic), 10922 (better coefficients), 10996 (Polar Express).

| name | steps | sends [0.01, 1] to | slope at 0 | source |
|---|---|---|---|---|
| taylor | any | slow | 1.875 each | Taylor series of t^(-1/2) at 1, post 10592 |
| keller | any, 5 | [0.68, 1.13] | 485 | Keller Jordan's Muon; does not converge, hovers about 1 |
| quintic | 5 | [0.978, 1.032] | 493 | You Jiacheng's five triples; the default |
| su | 5 | [0.95, 1.05] | 662 | Su's five triples, post 10922 |
| polar-express | any, 5 | [0.87, 1.13] | 986 | greedy minimax from 1e-3, arXiv 2505.16932 |
| exact | 9 | 1 within 1e-6 | 12000 | six minimax stages from 1e-3, then taylor |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quintic.core import ConfigError, suggest

__all__ = [
    "PRESETS",
    "Coefficients",
    "Schedule",
    "fitted_coefficients",
    "gaussian_spectrum",
    "polar_express_coefficients",
    "resolve_schedule",
]

Triple: TypeAlias = tuple[float, float, float]
Schedule: TypeAlias = tuple[Triple, ...]
Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]]

_TAYLOR: Triple = (15 / 8, -5 / 4, 3 / 8)
_KELLER: Triple = (3.4445, -4.7750, 2.0315)
_FIXED: dict[str, Schedule] = {
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "su": (
        (4.6182, -12.9582, 9.3299),
        (3.8496, -7.9585, 4.3052),
        (3.5204, -7.2918, 4.0606),
        (3.2067, -6.8243, 4.2802),
        (3.2978, -5.7848, 3.8917),
    ),
}
PRESETS = ("taylor", "keller", "quintic", "su", "polar-express", "exact")
"""Names that :func:`resolve_schedule` knows."""

_DEFAULT_STEPS = 5
_FIT_ITERATIONS = 200
_FIT_STARTS = (_TAYLOR, _KELLER, (2.5, -2.7, 1.2))  # the last for long matrices
_MARGIN = 0.01  # rounding (above all in bfloat16) can leave a singular value a little above 1
_CUSHION = 0.02407327424182761  # of the Polar Express authors' code; post 10996 prints it as 0.1


def polar_express_coefficients(
    l: float = 1e-3,  # noqa: E741 - the paper's letter
    steps: int = 5,
    degree: int = 5,
    safety: float = 1.01,
    cushion: float = _CUSHION,
) -> Schedule:
    """Greedy minimax schedule for singular values in [l, 1] (Polar Express, arXiv 2505.16932, post 10996).

    Stage t is the odd polynomial closest to 1 in the maximum norm on the interval [l_t, u_t] that the stages
    before it leave, found by Remez exchange; then l_{t+1} = p(l_t), u_{t+1} = 2 - l_{t+1}. Greedy is optimal.

    Args:
        l: Smallest singular value to bring to 1, in (0, 1].
        steps: Number of stages.
        degree: 3 or 5; degree 3 has c = 0.
        safety: Every stage but the last is p(x / safety), so that inputs up to ``safety`` are in range too.
            1 gives the undamped optimum.
        cushion: Lower end of a stage's interval relative to its upper end, at least; keeps early stages
            from steep oscillation. 0 gives the true greedy optimum.

    Returns:
        ``steps`` triples (a, b, c).

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> [round(x, 5) for x in polar_express_coefficients(1e-3, 3, safety=1.0)[0]]
        [8.28721, -23.59589, 17.30039]
    """
    if not 0.0 < l <= 1.0:
        raise ConfigError(f"l = {l}; expected the smallest singular value to bring to 1, in (0, 1], for example 1e-3")
    if steps < 1:
        raise ConfigError(f"steps = {steps}; expected at least 1")
    if degree not in (3, 5):
        raise ConfigError(f"degree = {degree}; expected 3 or 5")
    if safety < 1.0 or not 0.0 <= cushion < 1.0:
        raise ConfigError(f"safety = {safety}, cushion = {cushion}; expected safety >= 1 and 0 <= cushion < 1")
    low, high = l, 1.0
    schedule = []
    for step in range(steps):
        triple, error = _minimax(max(low, cushion * high), high, degree)
        # With a cushion the values, from p(low) to 1 + error, are not centred about 1: scale them so.
        triple = _scaled(triple, 2.0 / (_value(triple, low) + 1.0 + error))
        low = _value(triple, low)
        high = 2.0 - low
        damp = safety if step < steps - 1 else 1.0
        schedule.append((triple[0] / damp, triple[1] / damp**3, triple[2] / damp**5))
    return tuple(schedule)


def _minimax(low: float, high: float, degree: int) -> tuple[Triple, float]:
    """The odd polynomial of the given degree nearest to 1 on [low, high] in the maximum norm, and its error."""
    if low / high > 1 - 5e-6:
        # The interval is a point: there the minimax polynomial is the Newton-Schulz one, scaled.
        a, b, c = (1.5, -0.5, 0.0) if degree == 3 else _TAYLOR
        return (a / high, b / high**3, c / high**5), 0.0
    powers = np.arange(1, degree + 1, 2)
    # Equal errors of alternating sign at both ends and at the (degree - 1) / 2 inner extrema.
    inner = np.linspace(low, high, len(powers) + 1)[1:-1]
    a = b = c = 0.0
    error = math.inf
    for _ in range(100):
        points = np.concatenate([[low], inner, [high]])
        signs = (-1.0) ** np.arange(len(points))
        solution = np.linalg.solve(np.column_stack([points[:, None] ** powers, signs]), np.ones(len(points)))
        a, b, c = (*solution[:-1], 0.0)[:3]
        previous, error = error, float(solution[-1])
        if abs(previous - error) < 1e-15:
            break
        with np.errstate(invalid="ignore"):
            if degree == 3:
                inner = np.sqrt(np.array([-a / (3 * b)]))
            else:
                root = np.sqrt(9 * b * b - 20 * a * c)
                inner = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        if not np.all((low < inner) & (inner < high)):
            break  # the interval is so narrow that rounding decides; the solution is good to rounding too
    return (float(a), float(b), float(c)), error


def _value(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def _scaled(triple: Triple, factor: float) -> Triple:
    a, b, c = triple
    return a * factor, b * factor, c * factor


def gaussian_spectrum(rows: int, columns: int) -> NDArray[np.float64]:
    """Singular values of a large Gaussian matrix over its Frobenius norm: quantiles of the Marchenko-Pastur law.

    Returns:
        (min(rows, columns),) ascending, of unit length.

    Raises:
        ConfigError: A side is empty.

    Example:
        >>> s = gaussian_spectrum(1024, 256)
        >>> s.shape, round(float(s[-1] / s[0]), 2)  # for ever larger ones (1 + sqrt(1 / 4)) / (1 - sqrt(1 / 4)) = 3
        ((256,), 2.92)
    """
    short, long = sorted((rows, columns))
    if short < 1:
        raise ConfigError(f"a {rows} x {columns} matrix has no singular values; expected positive sides")
    ratio = short / long
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 200_001))) / 2  # dense at both ends
    density = np.sqrt(np.maximum((high - x) * (x - low), 0.0)) / np.maximum(x, 1e-300)
    cumulated = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) * np.diff(x))])
    squares = np.interp((np.arange(short) + 0.5) / short, cumulated / cumulated[-1], x)
    return np.sqrt(squares / squares.sum())


def fitted_coefficients(rows: int, columns: int, steps: int = 5) -> Schedule:
    """One triple, used ``steps`` times, with the least mean square error on Gaussian matrices (post 10592).

    Minimises mean((p(...p(sigma)) - 1)^2) over :func:`gaussian_spectrum`. The best triple depends on shape and steps:
    the further from square, the easier; Keller's is about that of large square matrices and 5 steps. The post asks for
    real fixed points x1, x2 in p(x) = x + k x (x^2 - x1^2) (x^2 - x2^2), that is b^2 >= 4 c (a - 1). That binds in its
    rows of 3 steps; without it, as here, the error is smaller, by half at 2048 x 1024.

    Args:
        rows: Of the matrices.
        columns: Likewise; only the shape up to transposition matters.
        steps: T, from 1 to 100.

    Returns:
        The triple, ``steps`` times. It may not keep what exceeds 1 by rounding in range, which
        :func:`resolve_schedule` then refuses.

    Raises:
        ConfigError: A side is empty, or the number of steps is out of range.

    Example:
        >>> a, b, c = fitted_coefficients(2048, 1024)[0]  # the post, from random samples: 2.644, -3.128, 1.476
        >>> round(a, 1), round(b, 1), round(c, 1)
        (2.6, -3.1, 1.5)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 100:
        raise ConfigError(f"steps = {steps!r}; expected a whole number from 1 to 100")
    sigma = gaussian_spectrum(rows, columns)
    fits = [_least_squares(start, sigma, steps) for start in _FIT_STARTS]  # there are local minima
    return (min(fits)[1],) * steps


def _least_squares(start: Triple, sigma: NDArray[np.float64], steps: int) -> tuple[float, Triple]:
    """(mean square error, triple) of the minimum near a start, by Levenberg and Marquardt."""
    triple: NDArray[np.float64] = np.array(start)
    damping = 1e-3
    residual, slopes = _composed(triple, sigma, steps)
    for _ in range(_FIT_ITERATIONS):
        normal = slopes.T @ slopes
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ residual)
        with np.errstate(all="ignore"):
            tried, tried_slopes = _composed(triple + move, sigma, steps)
        if np.mean(tried**2) < np.mean(residual**2):
            triple, residual, slopes, damping = triple + move, tried, tried_slopes, damping / 3
        elif damping < 1e12:
            damping *= 4
        else:
            break
    a, b, c = triple.tolist()
    return float(np.mean(residual**2)), (a, b, c)


def _composed(
    triple: NDArray[np.float64], sigma: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p(...p(sigma)) - 1 and its derivatives by a, b and c."""
    a, b, c = triple
    y, slopes = sigma, np.zeros((len(sigma), 3))
    for _ in range(steps):
        inner = a + 3 * b * y**2 + 5 * c * y**4
        slopes = inner[:, None] * slopes + np.stack([y, y**3, y**5], 1)
        y = y * (a + b * y**2 + c * y**4)
    return y - 1, slopes


def resolve_schedule(coefficients: Coefficients = "quintic", steps: int | None = None) -> Schedule:
    """The schedule for a name, one triple, or a sequence of triples.

    Args:
        coefficients: A name of :data:`PRESETS`; one triple (a, b, c), used ``steps`` times; or a sequence of triples.
        steps: Number of steps. ``None``: 5, or as many as the schedule lists. A listed schedule that is
            asked for more continues with the convergent Taylor triple; it cannot be cut short, since its
            early stages alone leave singular values far from 1.

    Raises:
        ConfigError: Unknown name, wrong shape, too few steps, or a schedule that does not keep (0, 1.01] in (0, 2].

    Example:
        >>> resolve_schedule("keller", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 100):
        raise ConfigError(f"steps = {steps!r}; expected a whole number from 1 to 100")
    if isinstance(coefficients, str):
        return _preset(coefficients, steps)
    try:
        array = np.asarray(coefficients, dtype=float)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (3,) and (array.ndim != 2 or array.shape[-1] != 3 or not len(array)):
        raise ConfigError(
            f"coefficients = {coefficients!r}; expected a name ({', '.join(PRESETS)}), a triple (a, b, c) or triples"
        )
    triples = tuple((a, b, c) for a, b, c in array.reshape(-1, 3).tolist())
    return _explicit(triples * (steps or _DEFAULT_STEPS) if array.ndim == 1 else triples, steps)


@functools.cache
def _preset(name: str, steps: int | None) -> Schedule:
    if name == "polar-express":
        return polar_express_coefficients(1e-3, steps or _DEFAULT_STEPS)
    if name == "taylor":
        return (_TAYLOR,) * (steps or _DEFAULT_STEPS)
    if name == "keller":
        return (_KELLER,) * (steps or _DEFAULT_STEPS)
    if name == "exact":
        return _continued(polar_express_coefficients(1e-3, 6) + (_TAYLOR,) * 3, steps)
    if name in _FIXED:
        return _continued(_FIXED[name], steps)
    raise ConfigError(f"unknown coefficients {name!r}{suggest(name, PRESETS)}")


@functools.cache
def _explicit(listed: Schedule, steps: int | None) -> Schedule:
    schedule = _continued(listed, steps)
    _refuse_divergent(schedule)
    return schedule


def _continued(listed: Schedule, steps: int | None) -> Schedule:
    """The listed steps, then Taylor's up to the number asked for."""
    if steps is not None and steps < len(listed):
        raise ConfigError(
            f"a schedule of {len(listed)} steps cannot be cut to {steps}; use at least as many steps, "
            "or coefficients 'polar-express' or 'keller', which take any number"
        )
    return listed + (_TAYLOR,) * ((steps or 0) - len(listed))


def _refuse_divergent(schedule: Schedule) -> None:
    """Singular values in (0, 1 + margin] must stay positive and bounded, else an update can explode or flip."""
    x = np.concatenate([np.geomspace(1e-6, 1e-2, 200), np.linspace(1e-2, 1.0 + _MARGIN, 4000)])
    with np.errstate(all="ignore"):
        y = x
        for a, b, c in schedule:
            y = y * (a + y * y * (b + y * y * c))
    bad = ~((y > 0.0) & (y <= 2.0))
    if bad.any():
        where, what = x[bad][0], y[bad][0]
        raise ConfigError(
            f"the schedule sends singular value {where:.4g} to {what:.4g}, but (0, {1 + _MARGIN}] must stay in (0, 2]. "
            "Divide a, b, c of all but the last step by s, s^3, s^5 with s slightly above 1, or use a preset"
        )
