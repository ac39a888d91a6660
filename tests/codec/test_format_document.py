"""A decoder written from docs/codec-format.md, and nothing of the codec's but what that document refers to."""

import binascii
import hashlib
import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from tests.codec.toys import picture, toy_codec

from quintic.codec import Curve, Plan, paper_plan, schedule
from quintic.codec.arithmetic import exact_exp, step_coefficients
from quintic.core.counter_rng import Stream

LEVELS = {1: 20, 2: 10, 3: 50, 4: 100, 5: 80, 6: 40, 7: 100, 8: 72}
CALLS = {**LEVELS, 5: 20, 6: 10, 7: 50, 8: 20}


class Reader:
    def __init__(self, data):
        self.data, self.place = data, 0

    def bytes(self, count):
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self):
        value, shift = 0, 0
        while True:
            byte = self.bytes(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def groups(size, m):
    return [(j * size // m, (j + 1) * size // m) for j in range(m)]


def radices_of(rule, m, size, coefficient_bits, robust):
    if rule == 0:
        return [2 * size] * m if robust else [math.comb(size, m) << m]
    if rule == 1:
        return [size]
    if rule == 2:
        return [size] + [size, 1 << coefficient_bits] * (m - 1)
    return [2 * (b - a) for a, b in groups(size, m)]


def log2_up(number):
    return (number - 1).bit_length()


def rate(knots, level):
    """r of point 3, and the information curve."""

    def information(level):
        i = min((level + 2560) // 64, 79)
        return 64 * knots[i] + (knots[i + 1] - knots[i]) * (level + 2560 - 64 * i)

    wanted = information(level) + 8192
    there = next((u for u in range(level, 2561) if information(u) >= wanted), None)
    reached = 2560 if there is None else there - (information(there) > wanted)
    u = min(2560, max(level + 64, reached))
    return (information(u) - information(level)) / 4096 / (snr(u) - snr(level))


def snr(level):
    return exact_exp(level / 256)


def preset_plan(preset, knots, d, bits, robust):
    """Levels, atoms of each step and numbers of the calls, by the five points of the document."""
    most, calls = LEVELS[preset], CALLS[preset]

    def spread(total):
        steps = min(most - 1, total)
        return [(i + 1) * total // steps - i * total // steps for i in range(steps)]

    def cost(total):
        radices = [r for m in spread(total) for r in radices_of(3, m, d, 0, robust)]
        return sum(map(log2_up, radices)) if robust else log2_up(math.prod(radices))

    largest = min(bits, (calls - 1) * max(1, d // 4))
    atoms = spread(next(a for a in range(largest, -1, -1) if cost(a) <= bits))

    levels, budgets = [-2560], [log2_up(math.prod(radices_of(3, m, d, 0, False))) for m in atoms]
    carried, of = (3, 5) if preset > 4 and any(64 * b > d for b in budgets) else (2, 3)
    for budget in budgets:
        level = levels[-1]
        if level >= 2560:
            levels.append(level + 1)
            continue
        paid, following = of * rate(knots, level), level + 1
        while following < 2560 and paid * (snr(following) - snr(level)) < carried * budget:
            following += 1
        levels.append(following)
    last = len(atoms)
    few = {(j * last + (calls - 1) // 2) // (calls - 1) for j in range(calls)}
    if preset == 8:
        parts = 5 * (calls - 1) ** 2
        few = {max(j, (j * (3 * (calls - 1) + 2 * j) * last + parts // 2) // parts) for j in range(calls)}
    return levels, atoms, few if last >= calls else set(range(last + 1))


def sylvester(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


def orthogonal_atoms(d, seed, step, single):
    """All of them, as rows."""
    common = np.argsort(Stream(seed, "orthogonal codebook", "order").words(0, d), kind="stable")
    rounds = []
    for i in range(2):
        words = Stream(seed, "orthogonal codebook", step).words(i * d, d)
        signs = np.where(words >> np.uint64(63), -1.0, 1.0)
        order = np.argsort(words << np.uint64(1), kind="stable") if d & d - 1 else np.arange(d)
        if single:
            order = common if i else np.arange(d)
        hadamard, first = np.zeros((d, d)), 0
        for size in [1 << bit for bit in reversed(range(d.bit_length())) if d >> bit & 1]:
            hadamard[first : first + size, first : first + size] = sylvester(size) / math.sqrt(size)
            first += size
        rounds.append(hadamard @ (signs[:, None] * np.eye(d)[order]))
    return math.sqrt(d) * rounds[1] @ rounds[0]


def unit(z):
    return z / math.sqrt(np.square(np.rint(z * 65536) / 65536).mean())


def unrank(rank, m):
    atoms = []
    for i in range(m, 0, -1):
        c = next(c for c in itertools.count(i - 1) if math.comb(c + 1, i) > rank)
        atoms.append(c)
        rank -= math.comb(c, i)
    return atoms[::-1]


def noise(rule, m, digits, book, seed, step, size, d, coefficient_bits, robust, single):
    if book == 0:
        atoms = orthogonal_atoms(d, seed, step, single)
    else:
        name = "shared" if book == 2 else step
        atoms = Stream(seed, "codebook", name).normal(0, size * d).reshape(size, d)
    if rule == 1:
        return atoms[digits[0]]
    if rule == 2:
        z = unit(atoms[digits[0]])
        for atom, code in zip(digits[1::2], digits[2::2], strict=True):
            g = code / ((1 << coefficient_bits) - 1)
            z = unit(math.sqrt(g) * z + math.sqrt(1 - g) * atoms[atom]) if code else z
        return z
    if rule == 3:
        chosen = [(a + digit // 2, digit % 2) for (a, _), digit in zip(groups(size, m), digits, strict=True)]
    elif robust:
        chosen = [(digit // 2, digit % 2) for digit in digits]
    else:
        chosen = [(c, digits[0] >> m - 1 - j & 1) for j, c in enumerate(unrank(digits[0] >> m, m))]
    return unit(sum((1 - 2 * sign) * atoms[c] for c, sign in chosen))


def digits_of(codes, radices, robust):
    whole, bits, out = int.from_bytes(codes, "big"), 8 * len(codes), []
    for radix in radices:
        if robust:
            bits -= log2_up(radix)
            out.append(whole >> bits & (1 << log2_up(radix)) - 1)
        else:
            whole *= radix
            out.append(whole >> bits)
            whole &= (1 << bits) - 1
    return out


def counted(length, side):
    return 1 if length <= side else 1 + -(-(length - side) // (side - side // 8))


def joined(tiles, height, width):
    c, h, w = tiles[0].shape
    rows, columns = counted(height, h), counted(width, w)
    if rows * columns == 1:
        return tiles[0][:, :height, :width]

    def ramp(side):
        return np.array([min(1, (1 + min(i, side - 1 - i)) / (side // 8 + 1)) for i in range(side)])

    shape = h + (rows - 1) * (h - h // 8), w + (columns - 1) * (w - w // 8)
    total, weights = np.zeros((c, *shape)), np.zeros(shape)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (h - h // 8), number % columns * (w - w // 8)
        weight = np.outer(ramp(h), ramp(w))
        total[:, y : y + h, x : x + w] += weight * tile
        weights[y : y + h, x : x + w] += weight
    return (total / weights)[:, :height, :width]


def bands_of(side):
    starts = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    return [max(i for i, start in enumerate(starts) if start <= k) for k in range(side)]


def cosines(side):
    rows = np.cos(np.pi * np.outer(np.arange(side), np.arange(side) + 0.5) / side)
    return rows / np.sqrt(np.square(rows).sum(1, keepdims=True))


def coarse(values, matrices, back):
    """D or its transpose in single precision."""
    power = 2.0 ** np.frexp(np.abs(values).max())[1]
    shifts = [-(-log2_up(len(m)) // 2) for m in matrices]
    steps = 2.0 ** (14 - max(shifts))
    y = values / power * steps
    for axis in (2, 1) if len(matrices[0]) == 1 else (2, 1, 0):
        m, y = np.rint(matrices[axis] * 512) / 512, np.rint(y)
        y = np.moveaxis(np.tensordot(m.T if back else m, y, (1, axis)), 0, axis) / 2 ** shifts[axis]
    return y * 2.0 ** sum(shifts) / steps * power


def moved(p, x_t, l_t, x, level, knots, residuals, single):
    """One tile's prediction between calls."""
    c, h, w = p.shape
    at = min(max(l_t, -2048), 2047)
    i, beyond = (at + 2048) // 1024, (at + 2048) % 1024 / 1024
    sizes, bands = (
        ((1 - beyond) * np.array(table[i]) + beyond * np.array(table[i + 1])) / 256
        for table in (residuals.sizes, residuals.bands)
    )
    rows, columns = bands_of(h), bands_of(w)
    b = bands.reshape(c, rows[-1] + 1, -1)[:, rows][:, :, columns]
    s = sizes[np.minimum(np.floor((p + 1) * 10.5), 20).astype(int)]
    colours = np.eye(c)
    if c == 3:
        colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    matrices = colours, cosines(h), cosines(w)
    transform = np.kron(colours, np.kron(cosines(h), cosines(w)))
    e = 1.2 * 2 * math.log(2) * rate(knots, min(l_t, 2559)) / (c * h * w)
    delta, m = snr(level) - snr(l_t), np.square(s).mean()
    n, n_t = (math.sqrt(snr(k) * (1 + snr(k))) for k in (level, l_t))
    v = n * x - n_t * x_t - delta * p.ravel()
    gain = e * b.ravel() / (1 + delta * e * b.ravel() * m)
    if single:
        seen = coarse(s * v.reshape(c, h, w), matrices, False)
        change = coarse(gain.reshape(c, h, w) * seen, matrices, True)
    else:
        change = transform.T @ (gain * (transform @ (s.ravel() * v)))
    return np.clip(p + s * change.reshape(p.shape), -1, 1).astype(np.float32).astype(float)


def decode(data, denoiser, knots, residuals):
    c, h, w = denoiser.shape
    d = c * h * w
    reader = Reader(data)
    assert reader.bytes(3) == bytes.fromhex("ab5143")
    version, preset = divmod(reader.bytes(1)[0], 16)
    flags = reader.bytes(1)[0]
    mode, robust = flags & 7, bool(flags & 16)
    assert version == 1 and flags < 32 and not flags & 8
    fingerprint = reader.bytes(2 if preset else 4)
    curve = hashlib.sha256(",".join(map(str, knots)).encode()).hexdigest()
    named = f"{denoiser.fingerprint} {curve}" if preset else denoiser.fingerprint
    if preset > 4:
        numbers = [n for tables in (residuals.sizes, residuals.bands) for row in tables for n in row]
        named += " " + hashlib.sha256(",".join(map(str, numbers)).encode()).hexdigest()
    assert fingerprint == hashlib.sha256(named.encode()).digest()[: len(fingerprint)]
    width, height, n = reader.varint() + 1, reader.varint() + 1, reader.varint()

    full, half = (height, width), ((height + 1) // 2, (width + 1) // 2)
    colour = mode in (1, 3, 5)
    sizes = [full] + [half] * (2 if colour and c == 1 else 0) + ([full] if mode in (2, 3) else [])
    per_plane = [counted(y, h) * counted(x, w) for y, x in sizes]
    count = sum(per_plane)

    if preset:
        book = seed = coefficient_bits = 0
        rule, size = 3, d
        levels, atoms, called = preset_plan(preset, knots, d, 8 * n // count, robust)
    else:
        length = reader.varint()
        end = reader.place + length
        book, rule = divmod(reader.bytes(1)[0], 16)
        size, coefficient_bits, seed, calls = (reader.varint() for _ in range(4))
        size = size or d
        levels = [reader.varint() - 32768]
        for _ in range(calls - 1):
            levels.append(levels[-1] + reader.varint())
        atoms = []
        while len(atoms) < calls - 1:
            run, m = reader.varint(), reader.varint()
            atoms += [m] * run
        assert reader.place == end
        called = set(range(calls))
    codes, body = reader.bytes(n), data[: reader.place]
    crc = binascii.crc_hqx(body, 0xFFFF).to_bytes(2, "big") if preset and n < 256 else zlib.crc32(body).to_bytes(4)
    assert data[reader.place :] == crc

    per_step = [radices_of(rule, m, size, coefficient_bits, robust) if m else [] for m in atoms]
    digits = iter(digits_of(codes, [r for own in per_step for _ in range(count) for r in own], robust))
    x = np.repeat(Stream(seed, "codec start").normal(0, d)[None], count, 0)

    def predicted(level):
        shown = [torch.from_numpy(row.reshape(1, c, h, w)).float() for row in x]
        return np.stack([denoiser.predict_x0(one, level / 256).clamp(-1, 1).numpy()[0] for one in shown]).astype(float)

    last, x0 = 0, predicted(levels[0])
    said, seen = x0, x
    for step, m in enumerate(atoms):
        a, b, std = step_coefficients(levels[step], levels[step + 1])
        if m:
            own = [[next(digits) for _ in per_step[step]] for _ in range(count)]
            z = np.stack(
                [noise(rule, m, o, book, seed, step, size, d, coefficient_bits, robust, preset == 8) for o in own]
            )
        else:
            z = Stream(seed, "codec step without a code", step).normal(0, d)[None]
        x = a * x + b * x0.reshape(count, d) + std * z
        if step + 1 in called:
            last, x0 = step + 1, predicted(levels[step + 1])
            said, seen = x0, x
        else:
            here = levels[step + 1]
            x0 = np.stack(
                [
                    moved(p, x_t, levels[last], now, here, knots, residuals, preset == 8)
                    for p, x_t, now in zip(said, seen, x, strict=True)
                ]
            )

    planes, first = [], 0
    for (y, wide), number in zip(sizes, per_plane, strict=True):
        plane = joined(x0[first : first + number], y, wide)
        planes.append(plane if c == 1 or (colour and not planes) else plane.mean(0, keepdims=True))
        first += number
    shown = [planes[0]]
    if colour and c == 1:
        luma = planes[0][0]
        blue, red = (np.repeat(np.repeat(p[0], 2, 0), 2, 1)[:height, :width] for p in planes[1:3])
        b, r = luma + 1.772 * blue, luma + 1.402 * red
        shown = [np.stack([r, (luma - 0.299 * r - 0.114 * b) / 0.587, b])]
    if mode in (2, 3):
        shown.append(planes[-1])
    elif mode in (4, 5):
        shown.append(np.ones((1, *full)))
    values = np.concatenate(shown).transpose(1, 2, 0)
    return np.clip(np.floor((values + 1) * 127.5 + 0.5), 0, 255)


@pytest.mark.parametrize(
    "mode,size,channels,options",
    [
        ("L", (12, 12), 1, {"target_bytes": 60}),
        ("L", (12, 12), 1, {"target_bytes": 300, "robust": True}),
        ("L", (9, 12), 1, {"target_bytes": 14}),
        ("LA", (12, 5), 1, {"target_bytes": 90}),
        ("RGB", (20, 13), 1, {"target_bytes": 200}),
        ("RGBA", (20, 13), 3, {"target_bytes": 300, "robust": True}),
        ("L", (12, 12), 1, {"plan": paper_plan(8, 64)}),
        ("L", (12, 12), 1, {"plan": paper_plan(8, 64, shared=True), "robust": True}),
        ("L", (12, 12), 1, {"plan": paper_plan(6, 64, atoms=3, coefficient_bits=2)}),
        ("L", (12, 12), 1, {"plan": Plan((-900, 0, 600), (4, 5), book="gaussian", size=60, seed=5)}),
        ("L", (12, 12), 1, {"plan": Plan((-900, 0, 600, 700), (4, 0, 7), rule="grouped"), "robust": True}),
    ],
)
@pytest.mark.parametrize("preset", ["standard", "fast", "finest"])
def test_the_document_is_enough_to_decode(mode, size, channels, options, preset):
    codec = toy_codec(12, channels, preset=preset)
    made = codec.code(picture(*size, mode), **options)
    model = codec._own
    pixels = decode(made.data, model.denoiser, model.curve.knots, model.curve.residuals)
    expected = np.asarray(made.image, dtype=float).reshape(pixels.shape)
    # Another order of sums can turn a value that lies on the edge between two bytes.
    assert np.abs(pixels - expected).max() <= 1 and (pixels != expected).mean() < 0.02


@pytest.mark.parametrize("preset", LEVELS)
@pytest.mark.parametrize("d,bits", [(784, 90), (784, 400), (784, 1100), (144, 300), (3, 12)])
def test_its_plans_are_those_of_the_presets(preset, d, bits):
    """Short steps and long ones, levels fewer than calls and more."""
    knots = tuple(640 * d * i * i // 6400 for i in range(81))
    levels, atoms, called = preset_plan(preset, knots, d, bits, False)
    plan = schedule.preset_plan(preset, Curve(knots), d, schedule.atoms_that_fit(preset, d, bits))
    assert (list(plan.levels), list(plan.atoms)) == (levels, atoms)
    assert set(range(len(levels)) if plan.called is None else plan.called) == called
