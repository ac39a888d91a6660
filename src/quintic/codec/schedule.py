"""Where the steps are: noise levels at equal gains of information, and how many atoms each step gets.

What a noisy image tells about the clean one is the model's information curve (:mod:`quintic.codec.curve`). One call of
the denoiser serves a whole step, so a step costs what it would if the denoiser's error stayed as it is where the step
begins (the Kullback-Leibler divergence of the true step from DDPM's): 1/2 E |x_0 - E[x_0 | x]|^2 times the gain of snr,
more than the curve says. Each step goes as far as its bits pay for; atoms carry about three quarters of theirs. Evenly
spaced steps, the paper's, spend a third of the stream where a step has nothing to learn, and skip the levels where it
has much. The prediction where the bits end is the image.

Noise levels are whole numbers of 1/256 log_snr; they follow from the curve by arithmetic that is the same on every
platform.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from quintic.codec.arithmetic import UNIT
from quintic.codec.codebook import Codebook, GaussianCodebook, OrthogonalCodebook
from quintic.codec.curve import FIRST, LAST, Curve, snr_at
from quintic.codec.packing import digit_bits
from quintic.codec.selection import Grouped, Pursuit, Rule, Signed, Single
from quintic.core import ConfigError, suggest

__all__ = [
    "BOOKS",
    "PRESETS",
    "RULES",
    "Plan",
    "Preset",
    "atoms_that_fit",
    "matched_levels",
    "most_atoms",
    "paper_plan",
    "preset_number",
    "preset_plan",
]

BOOKS = ("orthogonal", "gaussian", "shared")
RULES = ("signed", "single", "pursuit", "grouped")

_KEPT = 1 << 14
"""Orthogonal codebooks up to this dimension are kept, 32 bytes a value: 64 MB at most."""


@dataclass(frozen=True)
class Plan:
    """Everything that decoder and encoder must agree on besides the model.

    Raises:
        ConfigError: Levels that do not rise, or counts that do not fit them.
    """

    levels: tuple[int, ...]
    """Noise levels, rising."""
    atoms: tuple[int, ...]
    """Atoms of each step between two levels; 0 takes the start noise of that step's number and costs no bit."""
    book: str = "orthogonal"
    size: int = 0
    """Atoms of a Gaussian codebook; an orthogonal one has as many as an image has values."""
    rule: str = "signed"
    coefficient_bits: int = 0
    """Of matching pursuit."""
    seed: int = 0
    called: tuple[int, ...] | None = None
    """Numbers of the levels at which the denoiser is called, rising from 0; None calls it at every level. Between calls
    predictions move by :class:`quintic.codec.between.Between`."""
    single: bool = False
    """Compute in single precision, apart from the denoiser; for grouped atoms of orthogonal codebooks."""

    def __post_init__(self) -> None:
        if self.book not in BOOKS:
            raise ConfigError(f"unknown codebook {self.book!r}{suggest(self.book, BOOKS)}")
        if self.rule not in RULES:
            raise ConfigError(f"unknown rule {self.rule!r}{suggest(self.rule, RULES)}")
        if not self.levels or any(a >= b for a, b in itertools.pairwise(self.levels)):
            raise ConfigError("noise levels of a plan must rise")
        if min(self.levels) < -(1 << 15) or max(self.levels) >= 1 << 15:
            raise ConfigError("noise levels of a plan must lie in -128 <= log_snr < 128")
        if self.called is not None and (
            not self.called
            or self.called[0] != 0
            or any(a >= b for a, b in itertools.pairwise((*self.called, len(self.levels))))
        ):
            raise ConfigError("calls of a plan begin at level 0 and rise within its levels")
        if len(self.atoms) != len(self.levels) - 1 or any(m < 0 for m in self.atoms):
            raise ConfigError(f"{len(self.levels)} noise levels need {len(self.levels) - 1} counts of atoms")
        if (self.book == "orthogonal") != (self.size == 0):
            raise ConfigError("the size of a codebook is set for gaussian and shared ones, and only there")
        if self.size and not 2 <= self.size <= 1 << 20:
            raise ConfigError(f"a codebook has 2 to 2^20 atoms, found {self.size}")
        if (self.rule == "pursuit") != (self.coefficient_bits > 0):
            raise ConfigError("coefficient bits are set for matching pursuit, and only there")
        if self.rule == "single" and any(m > 1 for m in self.atoms):
            raise ConfigError("rule single takes one atom a step; see signed and pursuit")
        if self.single and (self.book, self.rule) != ("orthogonal", "grouped"):
            raise ConfigError("single precision is for grouped atoms of orthogonal codebooks only")
        for step in range(len(self.atoms)):
            self.step_rule(step)

    @property
    def calls(self) -> int:
        """Calls of the denoiser for an image or a batch of them."""
        return len(self.levels if self.called is None else self.called)

    def step_rule(self, step: int) -> Rule | None:
        """How a step is coded; None if it is not."""
        return _rule(self.rule, self.atoms[step], self.coefficient_bits)

    def step_book(self, step: int, dimension: int, kept: dict[int, Codebook] | None = None) -> Codebook:
        """The codebook of a step. A shared one is made once and put into ``kept``."""
        if self.book == "orthogonal":
            make = _orthogonal if dimension <= _KEPT else OrthogonalCodebook
            return make(dimension, self.seed, step, single=self.single)
        if self.book == "gaussian":
            return GaussianCodebook(dimension, self.size, self.seed, step)
        kept = {} if kept is None else kept
        if dimension not in kept:
            kept[dimension] = GaussianCodebook(dimension, self.size, self.seed, None)
        return kept[dimension]

    def step_radices(self, step: int, dimension: int, *, joint: bool = True) -> list[int]:
        """Radices of the digits of one image at one step."""
        rule = self.step_rule(step)
        return [] if rule is None else rule.radices(self.size or dimension, joint=joint)

    def image_bits(self, dimension: int, *, joint: bool = True) -> int:
        """Bits of one image of d values: those of the product of all radices, or of each digit by itself."""
        radices = [r for step in range(len(self.atoms)) for r in self.step_radices(step, dimension, joint=joint)]
        return digit_bits(math.prod(radices)) if joint else sum(map(digit_bits, radices))


@dataclass(frozen=True)
class Preset:
    """A way to make plans from a number of bits."""

    calls: int
    """Of the denoiser, at most."""
    levels: int
    """At most; where there are more than calls, the model's residuals are needed."""
    name: str
    single: bool = False
    """In single precision."""


PRESETS = {
    1: Preset(20, 20, "standard"),
    2: Preset(10, 10, "fast"),
    3: Preset(50, 50, "fine"),
    4: Preset(100, 100, "finest"),
    5: Preset(20, 80, "standard"),
    6: Preset(10, 40, "fast"),
    7: Preset(50, 100, "fine"),
    8: Preset(20, 72, "standard", single=True),
}


def preset_number(name: str, residuals: bool) -> int:
    """The key of :data:`PRESETS` for a name: the latest one, of those that do without residuals if there are none.

    Raises:
        ConfigError: Unknown name.
    """
    known = {p.name: number for number, p in PRESETS.items() if residuals or p.calls == p.levels}
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}{suggest(name, known)}")
    return known[name]


def most_atoms(preset: int, dimension: int) -> int:
    """The largest number of atoms of an image: a quarter of its values for each call but the first."""
    return (_preset(preset).calls - 1) * max(1, dimension // 4)


def atoms_that_fit(preset: int, dimension: int, bits: int, *, joint: bool = True) -> int:
    """The largest number of atoms of one image that takes no more than ``bits``."""
    steps, low, high = _preset(preset).levels - 1, 0, most_atoms(preset, dimension)
    if not joint:
        # More atoms can take fewer bits: of 784, groups of 65 need 8 bits each, those of 60 only 7.
        fitting = (a for a in range(min(high, bits), 0, -1) if _robust_bits(a, steps, dimension) <= bits)
        return next(fitting, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if _spread_bits(middle, steps, dimension) <= bits:
            low = middle
        else:
            high = middle - 1
    return low


def preset_plan(preset: int, curve: Curve, dimension: int, atoms: int) -> Plan:
    """Signed atoms of groups of orthogonal codebooks, spread over the steps, at levels matched to their bits.

    Args:
        preset: Key of :data:`PRESETS`.
        curve: Of the model.
        dimension: Values of an image.
        atoms: For one image.

    Raises:
        ConfigError: No such preset.
    """
    calls, most = _preset(preset).calls, _preset(preset).levels
    few, single = calls < most, _preset(preset).single
    counts = _spread(atoms, most - 1)
    bits = [_joint_bits((m,), dimension) for m in counts]
    called = None
    if len(counts) >= calls and single:
        # Denser where there is more noise: there predictions keep less well.
        parts = 5 * (calls - 1) ** 2
        places = (i * (3 * (calls - 1) + 2 * i) * len(counts) for i in range(calls))
        called = tuple(max(i, (place + parts // 2) // parts) for i, place in enumerate(places))
    elif len(counts) >= calls:
        called = tuple((i * len(counts) + (calls - 1) // 2) // (calls - 1) for i in range(calls))
    # Between calls predictions are not quite as good as the network's: where files are large and steps long, pictures
    # harder than most would fall behind.
    long = few and 64 * max(bits, default=0) > dimension
    levels = matched_levels(curve, bits, (3, 5) if long else (2, 3))
    return Plan(levels, counts, rule="grouped", called=called if few else None, single=single)


def matched_levels(curve: Curve, bits: Sequence[int], carried: tuple[int, int] = (2, 3)) -> tuple[int, ...]:
    """Noise levels as far apart as the bits of the steps between them pay for.

    Args:
        curve: Of the model.
        bits: Of each step.
        carried: Numerator and denominator of the part of them that counts. Two thirds: three quarters are carried, and
            the rate, past the level, is a tenth too low. A tenth more or less costs 0.2 dB at most.
    """
    levels = [FIRST]
    for budget in bits:
        level = levels[-1]
        following = level + 1
        if following < LAST:
            rate, here = carried[1] * curve.bits_per_snr(level), snr_at(level)
            reach = range(following, LAST)
            following += bisect.bisect_left(reach, carried[0] * budget, key=lambda to: rate * (snr_at(to) - here))
        levels.append(following)
    return tuple(levels)


def paper_plan(calls: int, size: int, *, atoms: int = 1, coefficient_bits: int = 0, shared: bool = False) -> Plan:
    """The paper's: evenly spaced times of the linear schedule of DDPM, Gaussian codebooks, argmax.

    Args:
        calls: T, of 2 to 1000; T - 1 steps are coded.
        size: K.
        atoms: M, of matching pursuit if more than 1.
        coefficient_bits: C of matching pursuit.
        shared: One codebook for all steps.
    """
    if not 2 <= calls <= 1000:
        raise ConfigError(f"the paper's plan has 2 to 1000 steps, found {calls}")
    betas = [1e-4 + (0.02 - 1e-4) * t / 999.0 for t in range(1000)]
    abar = list(itertools.accumulate((1.0 - beta for beta in betas), lambda p, q: p * q))
    times = [round(999.0 * i / (calls - 1)) for i in range(calls)]
    levels = [round(UNIT * (math.log(abar[t]) - math.log1p(-abar[t]))) for t in reversed(times)]
    return Plan(
        tuple(levels),
        (atoms,) * (calls - 1),
        book="shared" if shared else "gaussian",
        size=size,
        rule="pursuit" if atoms > 1 else "single",
        coefficient_bits=coefficient_bits if atoms > 1 else 0,
    )


@functools.lru_cache(128)
def _orthogonal(dimension: int, seed: int, step: int, *, single: bool) -> OrthogonalCodebook:
    """Kept, since every picture with a preset has the same ones."""
    return OrthogonalCodebook(dimension, seed, step, single=single)


@functools.lru_cache(128)
def _rule(name: str, atoms: int, coefficient_bits: int) -> Rule | None:
    if atoms == 0:
        return None
    match name:
        case "signed":
            return Signed(atoms)
        case "grouped":
            return Grouped(atoms)
        case "pursuit":
            return Pursuit(atoms, coefficient_bits)
        case _:
            return Single()


def _preset(number: int) -> Preset:
    if number not in PRESETS:
        raise ConfigError(f"unknown preset {number}{suggest(str(number), map(str, PRESETS))}")
    return PRESETS[number]


def _spread(total: int, steps: int) -> tuple[int, ...]:
    """``total`` atoms over at most ``steps`` steps, as evenly as whole numbers can."""
    steps = min(steps, total)
    return tuple((i + 1) * total // steps - i * total // steps for i in range(steps))


def _joint_bits(atoms: Sequence[int], dimension: int) -> int:
    return digit_bits(math.prod(radix for m in atoms for radix in Grouped(m).radices(dimension, joint=True)))


@functools.lru_cache(1 << 10)
def _spread_bits(total: int, steps: int, dimension: int) -> int:
    """Of as many atoms, spread over the steps; searches begin with the same ones, which are the longest."""
    return _joint_bits(_spread(total, steps), dimension)


def _robust_bits(total: int, steps: int, dimension: int) -> int:
    """Of as many atoms, spread over the steps."""
    steps = min(steps, total)
    fewer, larger = divmod(total, steps)
    own = (steps - larger) * _step_bits(fewer, dimension)
    return own + larger * _step_bits(fewer + 1, dimension) if larger else own


@functools.lru_cache(1 << 12)
def _step_bits(atoms: int, dimension: int) -> int:
    return sum(map(digit_bits, Grouped(atoms).radices(dimension, joint=False)))
