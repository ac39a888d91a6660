import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintic.codec import Header, Plan, paper_plan, read_parts
from quintic.codec.container import checksum_size, join
from quintic.core import CodecError, ConfigError

SIDES = st.integers(1, 1 << 21)
PRESET = st.builds(
    Header,
    width=SIDES,
    height=SIDES,
    mode=st.integers(0, 5),
    payload=st.integers(0, 600),
    fingerprint=st.binary(min_size=2, max_size=2),
    preset=st.integers(1, 4),
    exact=st.booleans(),
    robust=st.booleans(),
)
PLANS = [
    paper_plan(20, 64),
    paper_plan(100, 1 << 20, atoms=3, coefficient_bits=2, shared=True),
    Plan((-300, -5, 0, 800), (0, 9, 1)),
    Plan((0,), ()),
    Plan((-9, 9), (3,), book="gaussian", size=16384, seed=2**30),
]
OWN = st.builds(
    Header,
    width=SIDES,
    height=SIDES,
    mode=st.integers(0, 5),
    payload=st.integers(0, 600),
    fingerprint=st.binary(min_size=4, max_size=4),
    preset=st.just(0),
    plan=st.sampled_from(PLANS),
)


@given(PRESET | OWN, st.data())
def test_headers_come_back(header, data):
    codes = data.draw(st.binary(min_size=header.payload, max_size=header.payload))
    file = join(header, codes)
    parts = read_parts(file)
    assert parts.header == header and parts.data == codes and parts.complete and parts.intact
    assert len(file) == parts.header_bytes + header.payload + header.checksum_bytes


@given(PRESET)
def test_a_header_with_a_preset_has_at_most_16_bytes(header):
    assert len(header.to_bytes()) <= 16
    small = dataclasses.replace(header, width=28, height=28, payload=85)
    assert len(join(small, bytes(85))) == 85 + 12


def test_the_documented_bytes():
    header = Header(300, 28, 1, 3, b"\x12\x34", preset=2, exact=True)
    file = join(header, b"abc")
    assert file[:13].hex(" ") == "ab 51 43 12 09 12 34 ab 02 1b 03 61 62"
    assert file.hex() == "ab514312091234ab021b03616263" + "".join(f"{b:02x}" for b in crc16(file[:-2]))


def crc16(data):
    """CRC-16/CCITT-FALSE bit by bit, as the format's description says."""
    register = 0xFFFF
    for byte in data:
        register ^= byte << 8
        for _ in range(8):
            register = (register << 1 ^ 0x1021 if register & 0x8000 else register << 1) & 0xFFFF
    return register.to_bytes(2, "big")


@pytest.mark.parametrize("payload,preset", [(60, 1), (300, 1), (20, 0)])
def test_every_single_flipped_bit_is_caught(payload, preset):
    plan = None if preset else PLANS[0]
    header = Header(28, 28, 0, payload, b"ab" if preset else b"abcd", preset=preset, plan=plan)
    file = join(header, bytes(range(256))[:payload] + bytes(max(0, payload - 256)))
    for bit in range(8 * len(file)):
        data = bytearray(file)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            read_parts(bytes(data))


def test_errors_say_what_is_wrong():
    file = join(Header(28, 28, 0, 40, b"ab"), bytes(40))
    newer = file[:3] + b"\x21" + file[4:]
    for data, words in [
        (b"", "nothing"),
        (b"\x89PNG", "no file of quintic codec"),
        (newer, "format version 2, this program knows up to 1"),
        (file[:20], "the file is cut: 20 of 52 bytes"),
        (file[:8], "cut within its header"),
        (file + b"x", "53 bytes where 52 were expected"),
        (file[:3] + b"\x1e" + file[4:], "preset 14 does not exist"),
        (file[:4] + b"\x80" + file[5:], "flags 10000000"),
        (file[:4] + b"\x20" + file[5:], "newer quintic: flags 00100000"),
        (file[:4] + b"\x06" + file[5:], "flags 00000110"),
        (file[:2], "it begins with ab 51"),
        (file[:7] + b"\x80\x00" + file[8:], "shortest form"),
    ]:
        with pytest.raises(CodecError, match=words):
            read_parts(data)


def test_a_cut_file_can_be_read_when_not_strict():
    file = join(Header(28, 28, 0, 40, b"ab"), bytes(range(40)))
    parts = read_parts(file[:30], strict=False)
    assert (parts.complete, parts.intact, parts.data) == (False, False, bytes(range(20)))


def test_a_side_has_an_end():
    header = Header(1 << 21, 1, 0, 0, b"ab")
    assert read_parts(join(header, b"")).header == header
    with pytest.raises(CodecError, match="more than 2097152 a side"):
        read_parts(join(dataclasses.replace(header, width=(1 << 21) + 1), b""))


@pytest.mark.parametrize("beyond", [{"called": (0, 1)}, {"single": True}])
def test_what_a_stored_plan_cannot_say_is_refused(beyond):
    plan = Plan((-900, 0, 600), (3, 4), rule="grouped", **beyond)
    with pytest.raises(ConfigError, match="only named as a preset"):
        Header(12, 12, 0, 0, b"abcd", preset=0, plan=plan).to_bytes()


def test_short_files_have_short_checksums():
    assert [checksum_size(1, 255), checksum_size(1, 256), checksum_size(0, 3)] == [2, 4, 4]
