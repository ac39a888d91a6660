"""Mutated and cut files: a typed error or a picture of the size the file says, nothing else."""

import binascii
import random
import struct
import zlib
from dataclasses import replace

import pytest
from PIL import Image
from tests.codec.toys import picture, toy_codec

from quintic.codec import Header, Plan, paper_plan, read_parts
from quintic.codec.container import _plan_bytes, join, varint
from quintic.core import CodecError, ConfigError

LONG = tuple(range(-500, 501))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan((-900, 0), (4,), seed=1 << 35), r"seed of a plan must be from 0 to 2\^35 - 1"),
        (Plan((-900, 0), (4,), seed=-1), "seed of a plan"),
        (Plan(LONG, (0,) * 999 + (1,)), "up to 1000 levels .* found 1001 levels"),
        (Plan((-900, 0), (65537,), book="gaussian", size=1 << 17), "up to 65536 atoms .* up to 65537"),
        (Plan(LONG[:300], (144,) * 299), "up to 16 a value: take fewer"),
    ],
)
def test_a_file_that_no_reader_takes_is_not_written(plan, words):
    with pytest.raises(ConfigError, match=words):
        toy_codec().encode(picture(12, 12), plan=plan)


def test_the_largest_plans_come_back():
    codec = toy_codec()
    for plan in (
        Plan((-900, 0), (4,), seed=(1 << 35) - 1),
        Plan(LONG[1:], (0,) * 998 + (1,)),
        Plan((-900, 0), (65536,), book="gaussian", size=1 << 17),
    ):
        header = Header(12, 12, 0, 0, b"abcd", preset=0, plan=plan)
        assert read_parts(join(header, b"")).header == header
    made = codec.code(picture(12, 12), plan=Plan((-900, 0), (4,), seed=(1 << 35) - 1))
    assert codec.decode(made.data).tobytes() == made.image.tobytes()


def files():
    codec = toy_codec()
    yield codec.encode(picture(12, 12), target_bytes=40)
    yield codec.encode(picture(12, 12), target_bytes=40, robust=True)
    yield codec.encode(picture(20, 9, "RGB"), target_bytes=90)
    yield codec.encode(picture(12, 12), plan=paper_plan(8, 64))
    yield codec.encode(picture(12, 12), plan=paper_plan(4, 64, atoms=3, coefficient_bits=2))
    yield codec.encode(picture(12, 12), plan=Plan((-900, 0, 600, 700), (4, 0, 7), rule="grouped"), robust=True)
    yield codec.encode(picture(12, 12), plan=Plan((-900, 0, 600), (4, 5)))


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        kind, at = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 4)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 4))
        if len(data) < 4:
            break
    return bytes(data)


def with_checksum(data):
    """The same bytes with a checksum that is right, where there is room for one."""
    try:
        size = read_parts(data, strict=False).header.checksum_bytes
    except CodecError:
        return data
    body = data[:-size]
    end = struct.pack(">H", binascii.crc_hqx(body, 0xFFFF)) if size == 2 else struct.pack(">I", zlib.crc32(body))
    return body + end


def check(data, strict):
    """True if it decoded."""
    codec = toy_codec(12, 1, max_pixels=1 << 14)
    try:
        image = codec.decode(data, strict=strict)
    except CodecError:
        return False
    header = read_parts(data, strict=False).header
    assert isinstance(image, Image.Image) and image.size == (header.width, header.height)
    return True


def fuzz(count, seed):
    rng, originals = random.Random(seed), list(files())
    decoded = 0
    for i in range(count):
        data = mutate(originals[i % len(originals)], rng)
        if data in originals:
            continue
        if i % 2:
            decoded += check(with_checksum(data), True)
        else:
            # A wrong checksum that happens to be right has one chance in 65536.
            assert not check(data, True)
            check(data, False)
    return decoded


def test_five_hundred_mutated_files():
    assert fuzz(500, 0) > 10  # with the checksum mended many are files again


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_mutated_files():
    assert fuzz(10_000, 1) > 200


def test_every_length_of_a_cut_file():
    for data in files():
        for length in range(len(data)):
            assert not check(data[:length], True)
            if length >= read_parts(data).header_bytes:
                assert check(data[:length], False)
            else:
                assert not check(data[:length], False)


def crafted(payload, plan, data=b"", **flags):
    """A file of this model with a checksum that is right."""
    codec = toy_codec(12, 1, max_pixels=1 << 14)
    header = read_parts(codec.encode(picture(12, 12), plan=Plan((-9, 9), (1,)))).header
    return codec, join(replace(header, payload=payload, plan=plan, **flags), data)


@pytest.mark.parametrize(
    "payload,plan",
    [
        (1 << 33, Plan((-9, 9), (1,))),  # more codes than memory
        (20, Plan((-9, 9), (1 << 16,), book="gaussian", size=1 << 20)),  # a number of atoms that would take minutes
        (1 << 12, Plan(tuple(range(1000)), (40,) * 999, book="gaussian", size=1 << 20)),
    ],
)
def test_absurd_claims_are_refused_before_they_are_computed(payload, plan):
    codec, data = crafted(20, plan, bytes(20))
    claimed = data.replace(
        varint(20) + varint(len(_plan_bytes(plan))), varint(payload) + varint(len(_plan_bytes(plan)))
    )
    with pytest.raises(CodecError, match="damaged"):
        codec.decode(claimed, strict=False)


@pytest.mark.parametrize("rule", ["signed", "grouped"])
@pytest.mark.parametrize("book,size", [("orthogonal", 0), ("gaussian", 100)])
@pytest.mark.parametrize("robust", [False, True])
def test_a_plan_of_more_atoms_than_there_are_is_refused(rule, book, size, robust):
    codec, data = crafted(300, Plan((-9, 9), (200,), book=book, size=size, rule=rule), bytes(300), robust=robust)
    with pytest.raises(CodecError, match="200 atoms of a codebook of 1"):
        codec.decode(data)


def test_a_shared_book_of_a_million_atoms_is_not_made_to_decode():
    plan = Plan((-9, 9), (1,), book="shared", size=1 << 20, rule="single")
    codec, data = crafted(3, plan, b"abc")
    assert codec.decode(data).size == (12, 12)  # 1.2 GB otherwise


def test_a_plan_of_too_many_steps_is_refused(monkeypatch):
    with monkeypatch.context() as patch:  # we would not write it
        patch.setattr("quintic.codec.container._MAX_LEVELS", 2000)
        _, data = crafted(300, Plan(tuple(range(1001)), (1,) * 1000), bytes(300))
    with pytest.raises(CodecError, match="1001 steps"):
        read_parts(data)
