"""Numbers as a person writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["by_seed", "count", "duration", "finite", "plain", "significant"]


def count(value: float) -> str:
    """A large count in at most three digits and a unit, a small one exactly.

    Example:
        >>> count(842), count(9999), count(1_940_000), count(15.96e9)
        ('842', '9,999', '1.94 M', '16.0 B')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (1e4 if unit == "k" else size):
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f} {unit}"
    return f"{value:,.0f}"


def by_seed(ratios: Sequence[float]) -> str:
    """How far the seeds' ratios lie apart, as a remark after their mean; nan is a seed that has none.

    Example:
        >>> by_seed([0.5, 0.25, 0.3]), by_seed([0.5, math.nan]), by_seed([0.5])
        (' (0.25 to 0.50 by seed)', ' (not with every seed)', '')
        >>> by_seed([0.501, 0.499])
        ' (with every seed)'
    """
    if len(ratios) < 2:
        return ""
    if any(math.isnan(ratio) for ratio in ratios):
        return " (not with every seed)"
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return " (with every seed)" if low == high else f" ({low} to {high} by seed)"


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    Example:
        >>> duration(8.25), duration(292), duration(7384), duration(205_000)
        ('8.2 s', '4 min 52 s', '2 h 3 min', '2 d 8 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    raise AssertionError("a minute or more matches a unit")


def finite(value: float, digits: int, otherwise: str = "") -> str:
    """A number to some decimals, or other words where there is none.

    Example:
        >>> finite(2.5, 4), finite(math.inf, 4, "diverged")
        ('2.5000', 'diverged')
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else otherwise


def significant(value: float, digits: int = 3) -> str:
    """A number to some significant digits, without an exponent where that is readable.

    Example:
        >>> significant(0.02), significant(0.00012345), significant(1.0), significant(2.3456e-9)
        ('0.02', '0.000123', '1', '2.35e-09')
    """
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    text = f"{value:.{digits}g}"
    return f"{float(text):.10f}".rstrip("0").rstrip(".")


def plain(value: object) -> str:
    """Any recorded value in words: thousands separated, lists joined, yes and no.

    Example:
        >>> plain(1198400), plain(0.05), plain(True), plain(["a", 2]), plain({"bytes": 1200, "source": "b"})
        ('1,198,400', '0.05', 'yes', 'a, 2', 'bytes 1,200, source b')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return significant(value, 6)
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    return str(value)
