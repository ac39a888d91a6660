"""The code of some images as one sequence: step by step, and at each step image by image.

So a prefix holds the first steps of all images, from which they can be made at lower quality. Between the symbols of
a rule and the bytes of a file stand digits (:mod:`quintic.codec.packing`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from quintic.codec.packing import digit_bits, pack, pack_robust, unpack, unpack_robust
from quintic.codec.schedule import Plan
from quintic.codec.selection import Ids
from quintic.core import ConfigError
from quintic.core.counter_rng import Stream

__all__ = ["from_bytes", "from_sequence", "payload_size", "random_symbols", "to_bytes", "to_sequence"]


def _digits(plan: Plan, dimension: int, joint: bool) -> list[list[int]]:
    """Radices of one image at each step."""
    return [plan.step_radices(step, dimension, joint=joint) for step in range(len(plan.atoms))]


def payload_size(plan: Plan, count: int, dimension: int, *, joint: bool = True) -> int:
    """Bytes of ``count`` images."""
    return (count * plan.image_bits(dimension, joint=joint) + 7) // 8


def to_bytes(plan: Plan, codes: Sequence[Ids], dimension: int, size: int, *, joint: bool = True) -> bytes:
    """Symbols (images, symbols) of each step to ``size`` bytes."""
    radices, digits = [], []
    for step, per_image in enumerate(_digits(plan, dimension, joint)):
        rule = plan.step_rule(step)
        if rule is None:
            continue
        for ids in codes[step].tolist():
            digits += rule.to_digits(ids, joint=joint)
            radices += per_image
    return (pack if joint else pack_robust)(digits, radices, size)


def from_bytes(
    data: bytes, plan: Plan, count: int, dimension: int, size: int, *, joint: bool = True, strict: bool = True
) -> list[Ids]:
    """The steps that ``data``, all ``size`` bytes or the first of them, holds whole.

    Raises:
        CodecError: A robust file holds an impossible index, and ``strict``.
    """
    per_step = _digits(plan, dimension, joint)
    radices = [radix for per_image in per_step for _ in range(count) for radix in per_image]
    digits = iter(unpack(data, radices, size) if joint else unpack_robust(data, radices, strict=strict))
    codes: list[Ids] = []
    for step, per_image in enumerate(per_step):
        rule = plan.step_rule(step)
        if rule is None:
            codes.append(np.zeros((count, 0), dtype=np.int64))
            continue
        own = list(itertools.islice(digits, count * len(per_image)))
        if len(own) < count * len(per_image):
            break
        parts = [own[i : i + len(per_image)] for i in range(0, len(own), len(per_image))]
        codes.append(np.array([rule.from_digits(part, joint=joint) for part in parts], dtype=np.int64))
    return codes


def to_sequence(codes: Sequence[Ids]) -> Ids:
    """All symbols, (total,)."""
    return np.concatenate([ids.ravel() for ids in codes]) if codes else np.zeros(0, dtype=np.int64)


def from_sequence(sequence: Ids, plan: Plan, count: int, dimension: int) -> list[Ids]:
    """The inverse of :func:`to_sequence`, for ``count`` images.

    Raises:
        ConfigError: Wrong length, or a symbol that its rule does not have.
    """
    codes, first = [], 0
    for step in range(len(plan.atoms)):
        rule = plan.step_rule(step)
        radices = [] if rule is None else rule.radices(plan.size or dimension, joint=False)
        own = sequence[first : first + count * len(radices)]
        first += count * len(radices)
        if len(own) != count * len(radices) or (own < 0).any() or (own >= np.array(radices * count)).any():
            raise ConfigError(f"the tokens of step {step} are not {count} x {len(radices)} numbers of this plan")
        part = own.reshape(count, len(radices))
        if plan.rule == "signed" and (np.diff(part >> 1, axis=1) <= 0).any():
            raise ConfigError(f"the tokens of step {step} must name each atom once, in rising order")
        codes.append(part.astype(np.int64))
    if first != len(sequence):
        raise ConfigError(f"{len(sequence)} tokens where the plan has {first}")
    return codes


def random_symbols(plan: Plan, count: int, dimension: int, seed: int) -> list[Ids]:
    """Uniformly random codes, which generate images."""
    codes = []
    for step, radices in enumerate(_digits(plan, dimension, True)):
        rule, stream = plan.step_rule(step), Stream(seed, "random symbols", step)
        rows, first = [], 0
        for _ in range(count):
            digits = []
            for radix in radices:
                words = (digit_bits(radix) + 127) // 64  # 64 bits more than needed: no visible bias
                value = int.from_bytes(stream.words(first, words).astype("<u8").tobytes(), "little")
                digits.append(value * radix >> 64 * words)
                first += words
            rows.append([] if rule is None else rule.from_digits(digits, joint=True))
        codes.append(np.array(rows, dtype=np.int64).reshape(count, -1))
    return codes
