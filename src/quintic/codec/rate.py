"""How large a file becomes, and the search for one of a wanted size or quality."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from quintic.codec.arithmetic import UNIT
from quintic.codec.container import Header
from quintic.codec.curve import Curve
from quintic.codec.schedule import atoms_that_fit, most_atoms, preset_plan
from quintic.codec.symbols import payload_size
from quintic.codec.tiles import read_image
from quintic.codec.transparency import looks
from quintic.core import ConfigError, DataError

__all__ = ["Coded", "Sizes", "best_within", "decibels", "file_size", "largest_payload", "meet_psnr", "psnr"]


@dataclass(frozen=True)
class Coded:
    """What encoding made."""

    data: bytes
    """The file."""
    image: Image.Image
    """What :meth:`Codec.decode` will make of it."""
    psnr: float
    """In dB, of ``image`` (see :func:`psnr`); not a number if what was coded is not known itself."""
    unused: int = 0
    """Bytes that were allowed as well, and would have made the picture no better."""


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal to noise ratio of two pictures of one size and mode, in dB; infinite if they look the same.

    Of transparent ones (LA, RGBA) it is that of their looks on a black and on a white ground, both together.

    Args:
        a: 8 bits per channel; pictures of a palette count as their colours.
        b: Of the same size and mode.

    Raises:
        DataError: Another size or mode, or more than 8 bits per channel.

    Example:
        >>> round(psnr(Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 110)), 2)
        28.13
    """
    (x, _), (y, _) = read_image(a), read_image(b)
    if (x.size, x.mode) != (y.size, y.mode):
        raise DataError(
            f"expected two pictures of one size and mode, found {a.width} x {a.height} {a.mode} and "
            f"{b.width} x {b.height} {b.mode}; convert or resize one"
        )
    return decibels(float(np.square(looks(x) - looks(y)).mean()), 255.0)


def decibels(error: float, peak: float) -> float:
    """Of a mean squared error of values that span ``peak``; infinite for none."""
    return 10.0 * math.log10(peak**2 / error) if error else math.inf


@dataclass(frozen=True)
class Sizes:
    """Atoms per tile and bytes of all tiles, for a preset."""

    preset: int
    dimension: int
    count: int
    joint: bool

    @property
    def fewest(self) -> int:
        """The smallest number of atoms of a tile."""
        # A file of many tiles and no codes would be a long computation from nothing.
        return 0 if self.count == 1 else 1

    @property
    def most(self) -> int:
        """The largest number of atoms of a tile."""
        return most_atoms(self.preset, self.dimension)

    def atoms(self, payload: int) -> int:
        """How many atoms a tile gets if all tiles together have so many bytes."""
        return atoms_that_fit(self.preset, self.dimension, 8 * payload // self.count, joint=self.joint)

    def of_quality(self, quality: int) -> int:
        """How many atoms a tile gets at a quality of 1 to 100, or beyond."""
        bits = _BITS[0] * _BITS[1] ** ((quality - 1) / 99.0) * self.dimension
        return min(self.most, max(self.fewest, self.atoms(math.ceil(bits * self.count / 8))))

    def payload(self, atoms: int) -> int:
        """Bytes that all tiles take with so many atoms each."""
        plan = preset_plan(self.preset, _ANY_CURVE, self.dimension, atoms)
        return payload_size(plan, self.count, self.dimension, joint=self.joint)


_ATTEMPTS = 16
_BITS = (0.05, 60.0)
"""Bits per value at quality 1, and by how much quality 100 has more."""
_QUALITIES = 150
"""By this one an image has all the atoms that it can have."""
_SATED = 15 * UNIT // 2
"""Chains that end at this log_snr or a later one may have more atoms than do good."""
_SEARCHED = 7 * UNIT
"""From plans that end here on, files are tried."""
_FAILURES = 12
"""Files in a row without a better picture that end the search: each has a twenty-fifth more bits than the last."""
# The number of bits of a plan does not depend on where its levels are.
_ANY_CURVE = Curve(tuple(range(81)))


def file_size(header: Header) -> int:
    """Bytes of a file."""
    return len(header.to_bytes()) + header.payload + header.checksum_bytes


def largest_payload(target: int, header: Callable[[int], Header], fits: Sizes) -> int:
    """Payload of the largest file of at most ``target`` bytes."""

    def total(payload: int) -> int:
        return file_size(header(payload))

    payload = fits.payload(fits.most)
    if total(payload) > target:
        payload = target
        while payload > 0 and total(payload) > target:
            payload -= 1
        payload = min(payload, fits.payload(min(fits.most, fits.atoms(payload)) if payload else 0))
    fewest = fits.payload(fits.fewest)
    if total(payload) > target or payload < fewest:
        raise ConfigError(f"this picture takes at least {total(fewest)} bytes, found target_bytes={target}")
    return payload


def best_within(
    payload: int, at: Callable[[int], Coded], fits: Sizes, curve: Curve, worth: Callable[[Coded], float]
) -> tuple[Coded, bool]:
    """The best file of at most so many bytes of codes.

    More atoms make longer steps between noise levels, for which the model's mean error says that they pay. Of a picture
    that the model knows less well, predictions then fall behind the noise and do not recover: the picture gets worse
    with every atom, and by chance with some. Where a chain is long enough for that, files are tried from a smaller one
    on, in steps of quality. All budgets have the same ones up to their own size, so that none is served better than a
    larger one.

    Args:
        payload: Bytes of the codes of the largest file.
        at: The file of a payload.
        fits: Payloads.
        curve: Of the model.
        worth: How good a file is.

    Returns:
        The file, and whether larger ones would have been worse.
    """

    def end(atoms: int) -> int:
        return preset_plan(fits.preset, curve, fits.dimension, atoms).levels[-1]

    most = min(fits.most, fits.atoms(payload))
    if end(most) < _SATED:
        return at(payload), False
    first = bisect.bisect_left(range(_QUALITIES), _SEARCHED, lo=1, key=lambda quality: end(fits.of_quality(quality)))
    files: dict[int, Coded] = {}
    best, value, failures = most, -math.inf, 0
    for quality in range(first, _QUALITIES):
        atoms = fits.of_quality(quality)
        if atoms > most or failures == _FAILURES or value == math.inf:
            break
        if atoms in files:
            continue
        files[atoms] = at(fits.payload(atoms))
        if (reached := worth(files[atoms])) > value:
            best, value, failures = atoms, reached, 0
        else:
            failures += 1
    if not files:
        return at(payload), False
    return files[best], best < max(files) or value == math.inf


def meet_psnr(target: float, at: Callable[[int, int], Coded], fits: Sizes) -> Coded:
    """The smallest file found within 0.2 dB of a PSNR; if all that are tried jump over it, the smallest above it.

    Args:
        target: In dB.
        at: The file of a payload and the number of an attempt; attempts after 0 start with other atoms.
        fits: Payloads.

    Raises:
        ConfigError: Out of reach.
    """
    tried: dict[int, Coded] = {}

    def code(atoms: int) -> float:
        if atoms not in tried:
            tried[atoms] = at(fits.payload(atoms), 0)
        return tried[atoms].psnr

    low, high = fits.fewest, min(fits.most, max(8, fits.fewest))
    if code(low) < target:
        while code(high) < target and high < fits.most:
            low, high = high, min(fits.most, 2 * high)
        while high - low > 1 and abs(tried[high].psnr - target) > 0.05:
            # Halfway in rate, or where a straight line would meet the target.
            a, b = tried[low].psnr, tried[high].psnr
            share = 0.5 if len(tried) % 3 == 0 or b <= a else min(0.9, max(0.1, (target - a) / (b - a)))
            middle = min(high - 1, max(low + 1, low + round(share * (high - low))))
            low, high = (middle, high) if code(middle) < target else (low, middle)
    good = [atoms for atoms, made in tried.items() if abs(made.psnr - target) <= 0.2]
    if good:
        return tried[min(good)]
    best = max(tried.values(), key=lambda made: made.psnr)
    ends = [code(fits.fewest), best.psnr]
    if ends[0] < target < ends[1]:  # quality is not quite steady in the number of atoms: look around
        near = min(tried, key=lambda atoms: abs(tried[atoms].psnr - target))
        for atoms in range(max(fits.fewest, near - 4), min(fits.most, near + 4) + 1):
            if abs(code(atoms) - target) <= 0.2:
                return tried[atoms]
        above = min(atoms for atoms, made in tried.items() if made.psnr > target)
        for attempt in range(1, _ATTEMPTS + 1):
            for atoms in (above - 1, above):
                made = at(fits.payload(atoms), attempt)
                if abs(made.psnr - target) <= 0.2:
                    return made
        return tried[above]
    raise ConfigError(
        f"target_psnr={target:g} is not within reach for this picture and model: files of "
        f"{len(tried[min(tried)].data)} to {len(best.data)} bytes give {ends[0]:.2f} to {ends[1]:.2f} dB"
    )
