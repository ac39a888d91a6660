"""Counter-based random numbers: element i of a stream is a pure function of (key, i).

Used wherever a number must not depend on how many were drawn before it: initial weights (equal on one
process and on a sharded mesh), data order (equal after a resume and on any number of ranks), codebooks
(equal on the machine that encodes and the one that decodes).

Words come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as
implemented by numpy, whose raw stream is fixed by its compatibility policy: word i is word ``i mod 4`` of
the block with counter ``i div 4``. The key is the first 16 bytes of SHA-256 over the seed and the labels.
From words to numbers, in IEEE-754 double operations only (+, -, *, /, sqrt, exact scaling by powers of
two), so that every platform gives the same bits:

* integer in [0, high): ``floor((w >> 32) * high / 2**32)``, for high <= 2**31 (bias below high / 2**32);
* uniform in (0, 1): ``((w >> 11) + 0.5) * 2**-53``;
* normal: the inverse distribution function of that uniform by Wichura's algorithm AS 241 (PPND16, relative
  error about 1e-16), with the logarithm computed by the series in ``_log`` rather than by a platform's own.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream"]

_MASK = (1 << 256) - 1
_LN2 = 0.6931471805599453


class Stream:
    """An endless sequence of random words, addressed by position.

    Args:
        seed: Any integer.
        *labels: What the stream is for, e.g. ``"weights", "blocks.0.attn.q.weight"``. Streams with
            different labels are independent; labels are told apart by type and length, so ``("a", "b")``
            and ``("ab",)`` differ.

    Example:
        >>> stream = Stream(0, "example")
        >>> bool((stream.words(5, 3) == stream.words(0, 8)[5:]).all())
        True
        >>> stream.integers(0, 5, 10).tolist()
        [9, 8, 4, 2, 8]
    """

    def __init__(self, seed: int, *labels: str | int) -> None:
        digest = hashlib.sha256()
        for part in (seed, *labels):
            encoded = str(part).encode()
            digest.update(f"{'i' if isinstance(part, int) else 's'}{len(encoded)}:".encode() + encoded)
        self._key = np.frombuffer(digest.digest()[:16], dtype="<u8").astype(np.uint64)

    def words(self, start: int, count: int) -> NDArray[np.uint64]:
        """Words ``start`` to ``start + count - 1``, each uniform over the 64-bit integers."""
        assert start >= 0 and count >= 0
        first_block, skip = divmod(start, 4)
        # numpy adds one to the counter before it makes a block.
        generator = np.random.Philox(key=self._key, counter=(first_block - 1) & _MASK)
        return generator.random_raw(skip + count)[skip:]

    def integers(self, start: int, count: int, high: int) -> NDArray[np.int64]:
        """Integers in [0, high), for 1 <= high <= 2**31."""
        assert 1 <= high <= 1 << 31
        return (((self.words(start, count) >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, start: int, count: int) -> NDArray[np.float64]:
        """Numbers in the open interval (0, 1), on a grid of 2**-53."""
        return ((self.words(start, count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, start: int, count: int) -> NDArray[np.float64]:
        """Standard normal numbers, one word each; the largest possible magnitude is 8.3."""
        return _normal_quantile(self.uniform(start, count))


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers by exact steps: x = m 2^e, log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    low = m < 0.7071067811865476
    m = np.where(low, m * 2.0, m)
    e = np.where(low, e - 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    # |s| <= 0.1716, so twelve terms leave a remainder below 1e-19.
    series = np.full_like(s, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series = series * s2 + 1.0 / odd
    return e * _LN2 + 2.0 * s * series


# Coefficients of AS 241, algorithm PPND16 (M. J. Wichura, Applied Statistics 37, 1988), lowest power first.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip


def _ratio(x: NDArray[np.float64], coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.float64]:
    numerator, denominator = (np.full_like(x, c[-1]) for c in coefficients)
    for a, b in zip(coefficients[0][-2::-1], coefficients[1][-2::-1], strict=True):
        numerator = numerator * x + a
        denominator = denominator * x + b
    return numerator / denominator


def _normal_quantile(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """The normal quantile of u in (0, 1)."""
    q = u - 0.5
    out = q * _ratio(0.180625 - q * q, _CENTRE)
    outer = np.abs(q) > 0.425
    if outer.any():
        tail = np.where(q < 0, u, 1.0 - u)[outer]
        r = np.sqrt(-_log(tail))
        value = np.where(r <= 5.0, _ratio(r - 1.6, _MIDDLE), _ratio(r - 5.0, _TAIL))
        out[outer] = np.where(q[outer] < 0, -value, value)
    return out
