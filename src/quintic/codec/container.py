"""The file: a header of 9 to 16 bytes, the codes, a checksum; ``docs/codec-format.md`` says every byte.

    offset  bytes  meaning
    0       3      magic ab 51 43
    3       1      version (high four bits, now 1) and preset (low four; 0: a plan of its own follows)
    4       1      bits 0-2 mode (0 L, 1 RGB, 2 LA, 3 RGBA, 4 LA and 5 RGBA without transparency), bit 3 exact,
                   bit 4 robust, bits 5-7 zero
    5       2      fingerprint of model and information curve (4 bytes, of the model alone, without a preset)
    7       1-3    width - 1, varint
            1-3    height - 1, varint
            1-5    bytes of the codes, varint
            ...    without a preset only: length of the plan, varint, and the plan
            n      codes, left-aligned
            2      checksum: CRC-16/CCITT (start ffff) of everything before it; CRC-32 in 4 bytes if the codes take
                   256 bytes or more, or without a preset

A varint holds seven bits a byte, lowest first, the top bit set in all but the last. Numbers of several bytes are
big-endian. Nothing here needs a model or torch.
"""

from __future__ import annotations

import binascii
import itertools
import struct
import zlib
from dataclasses import dataclass

from quintic.codec.schedule import BOOKS, PRESETS, RULES, Plan
from quintic.core import CodecError, ConfigError, DataError

__all__ = ["MAGIC", "MODES", "VERSION", "Header", "Parts", "checksum_size", "join", "read_parts"]

MAGIC = b"\xabQC"
VERSION = 1
MODES = ("L", "RGB", "LA", "RGBA", "LA", "RGBA")
"""By code; the last two are wholly opaque and their alpha is not coded."""
_MAX_SIDE = 1 << 21
_MAX_PLAN = 1 << 16
_MAX_LEVELS = 1000
_MAX_ATOMS = 1 << 16
_VARINT_BITS = 35


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    width: int
    height: int
    mode: int
    """Index into :data:`MODES`."""
    payload: int
    """Bytes of the codes."""
    fingerprint: bytes
    """2 bytes with a preset, else 4."""
    preset: int = 1
    """0 with a plan."""
    plan: Plan | None = None
    exact: bool = False
    robust: bool = False

    def to_bytes(self) -> bytes:
        """The header alone.

        Raises:
            ConfigError: A plan of its own that cannot be stored.
        """
        assert (self.preset == 0) == (self.plan is not None)
        flags = self.mode | self.exact << 3 | self.robust << 4
        out = MAGIC + bytes((VERSION << 4 | self.preset, flags)) + self.fingerprint
        out += varint(self.width - 1) + varint(self.height - 1) + varint(self.payload)
        if self.plan is not None:
            block = _plan_bytes(self.plan)
            out += varint(len(block)) + block
        return out

    @property
    def checksum_bytes(self) -> int:
        """Length of the checksum."""
        return checksum_size(self.preset, self.payload)


@dataclass(frozen=True)
class Parts:
    """A file taken apart."""

    header: Header
    header_bytes: int
    data: bytes
    """The codes, or as many of their bytes as there are."""
    complete: bool
    """Whether all bytes are there."""
    intact: bool
    """Whether the checksum is there and right."""


def checksum_size(preset: int, payload: int) -> int:
    """Bytes of the checksum of a file."""
    return 2 if preset and payload < 256 else 4


def _checksum(data: bytes, size: int) -> bytes:
    return struct.pack(">H", binascii.crc_hqx(data, 0xFFFF)) if size == 2 else struct.pack(">I", zlib.crc32(data))


def join(header: Header, data: bytes) -> bytes:
    """Header and codes to a file."""
    assert len(data) == header.payload
    body = header.to_bytes() + data
    return body + _checksum(body, header.checksum_bytes)


def read_parts(data: bytes, *, strict: bool = True) -> Parts:
    """Take a file apart.

    Args:
        data: The file, or its beginning.
        strict: Refuse a file that is cut, too long or whose checksum is wrong; else ``complete`` and ``intact`` tell.

    Raises:
        CodecError: It is no file of this kind, of a newer version, cut within the header, or, if strict, damaged.
        DataError: Not bytes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise DataError(f"expected the bytes of a file, found {type(data).__name__}; Path(name).read_bytes() reads one")
    data = bytes(data)
    if len(data) < 3 or data[:3] != MAGIC:
        raise CodecError(f"this is no file of quintic codec: it begins with {data[:3].hex(' ') or 'nothing'}")
    reader = _Reader(data, 3)
    first, flags = reader.take(2)
    version, preset = first >> 4, first & 15
    if version > VERSION:
        raise CodecError(f"the file has format version {version}, this program knows up to {VERSION}; update quintic")
    if version == 0 or (preset and preset not in PRESETS):
        raise CodecError(f"the file is damaged: version {version} with preset {preset} does not exist")
    if flags >> 5 or flags & 7 >= len(MODES):
        raise CodecError(f"the file is damaged, or made by a newer quintic: flags {flags:08b}")
    fingerprint = reader.take(2 if preset else 4)
    width, height, payload = 1 + reader.varint(), 1 + reader.varint(), reader.varint()
    if max(width, height) > _MAX_SIDE:
        raise CodecError(f"the file claims {width} x {height} pixels; more than {_MAX_SIDE} a side are not allowed")
    plan = None
    if not preset:
        length = reader.varint()
        if length > _MAX_PLAN:
            raise CodecError(f"the file is damaged: a plan of {length} bytes")
        plan = _plan_from(reader.take(length))
    header = Header(
        width, height, flags & 7, payload, fingerprint, preset, plan, bool(flags >> 3 & 1), bool(flags >> 4 & 1)
    )
    size = header.checksum_bytes
    end = reader.place + payload
    complete = len(data) == end + size
    intact = complete and _checksum(data[:end], size) == data[end:]
    if strict and len(data) < end + size:
        raise CodecError(
            f"the file is cut: {len(data)} of {end + size} bytes are there; what they hold can be decoded "
            "with strict=False, on the command line with --partial"
        )
    if strict and not complete:
        raise CodecError(f"the file has {len(data)} bytes where {end + size} were expected; it is damaged")
    if strict and not intact:
        raise CodecError("the checksum is wrong: the file is damaged; strict=False, or --partial, decodes it anyway")
    return Parts(header, reader.place, data[reader.place : end], complete, intact)


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    assert value >= 0
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


class _Reader:
    def __init__(self, data: bytes, place: int = 0) -> None:
        self.data = data
        self.place = place

    def take(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise CodecError(f"the file is cut within its header, after {len(self.data)} bytes")
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self) -> int:
        value = 0
        for shift in range(0, _VARINT_BITS, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if shift and byte == 0:
                    break
                return value
        raise CodecError("the file is damaged: a number of its header is not in its shortest form")


def _plan_bytes(plan: Plan) -> bytes:
    """codebook (high four bits) and rule, K, C, seed, T, first level, gaps, then runs of equal counts of atoms."""
    if not 0 <= plan.seed < 1 << _VARINT_BITS:
        raise ConfigError(f"the seed of a plan must be from 0 to 2^{_VARINT_BITS} - 1 to be stored, found {plan.seed}")
    if len(plan.levels) > _MAX_LEVELS or max(plan.atoms, default=0) > _MAX_ATOMS:
        raise ConfigError(
            f"a plan of up to {_MAX_LEVELS} levels with up to {_MAX_ATOMS} atoms between two can be stored, found "
            f"{len(plan.levels)} levels with up to {max(plan.atoms, default=0)}"
        )
    if plan.called is not None or plan.single:
        raise ConfigError(
            "a plan with fewer calls than levels or in single precision cannot be stored, only named as a preset"
        )
    out = bytes((BOOKS.index(plan.book) << 4 | RULES.index(plan.rule),))
    out += varint(plan.size) + varint(plan.coefficient_bits) + varint(plan.seed)
    out += varint(len(plan.levels)) + varint(plan.levels[0] + (1 << 15))
    out += b"".join(varint(b - a) for a, b in itertools.pairwise(plan.levels))
    runs = [(len(list(group)), count) for count, group in itertools.groupby(plan.atoms)]
    return out + b"".join(varint(length) + varint(count) for length, count in runs)


def _plan_from(block: bytes) -> Plan:
    reader = _Reader(block)
    try:
        book, rule = divmod(reader.take(1)[0], 16)
        size, bits, seed, calls = (reader.varint() for _ in range(4))
        if calls > min(len(block), _MAX_LEVELS):
            raise CodecError(f"the file is damaged: its plan has {calls} steps")
        levels = list(itertools.accumulate([reader.varint() - (1 << 15)] + [reader.varint() for _ in range(calls - 1)]))
        atoms: list[int] = []
        while len(atoms) < calls - 1:
            length, count = reader.varint(), reader.varint()
            if not 1 <= length <= calls - 1 - len(atoms) or count > _MAX_ATOMS:
                raise CodecError("the file is damaged: counts of atoms do not fit the steps")
            atoms += [count] * length
        if reader.place != len(block):
            raise CodecError("the file is damaged: its plan is longer than it says")
        return Plan(tuple(levels), tuple(atoms), BOOKS[book], size, RULES[rule], bits, seed)
    except (ConfigError, IndexError) as error:
        raise CodecError(f"the file is damaged: its plan is impossible ({error})") from error
