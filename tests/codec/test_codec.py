import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.codec.capability_probe import network
from tests.codec.toys import picture, smooth_model, toy_codec

from quintic.codec import Codec, Curve, Plan, paper_plan, psnr, read_parts
from quintic.codec.tiles import Layout
from quintic.core import CodecError, ConfigError, DataError
from quintic.diffusion import NetworkDenoiser, UNet


def same(a, b):
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (12, 12), (5, 40), (31, 19)])
def test_a_picture_comes_back_with_its_size_and_mode(mode, channels, size):
    codec, original = toy_codec(12, channels), picture(*size, mode)
    made = codec.code(original, quality=60)
    assert made.image.size == size and made.image.mode == mode
    assert same(codec.decode(made.data), made.image)
    if size != (1, 1):
        grey = Image.new(mode, size, (128,) * len(mode) if len(mode) > 1 else 128)
        assert made.psnr > psnr(original, grey) + 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(20, 200), st.booleans())
def test_files_are_never_larger_than_asked_and_decode_to_what_the_encoder_saw(width, height, target, robust):
    codec, original = toy_codec(), picture(width, height)
    try:
        made = codec.code(original, target_bytes=target, robust=robust)
    except ConfigError as error:
        assert f"target_bytes={target}" in str(error)
        need = int(str(error).split("at least ")[1].split()[0])
        assert need > target and len(codec.encode(original, target_bytes=need, robust=robust)) <= need
        return
    assert len(made.data) <= target
    assert same(codec.decode(made.data), made.image)


def test_a_codec_tells_its_model_and_preset():
    assert repr(Codec(preset="fast")) == "Codec(shipped models, preset='fast')"
    assert repr(toy_codec()).startswith("Codec(<") and repr(toy_codec()).endswith(", preset='standard')")


def test_more_bytes_give_a_better_picture_and_most_of_a_target_is_used():
    codec, original = toy_codec(), picture(12, 12)
    made = [codec.code(original, target_bytes=n) for n in (16, 25, 40, 60)]
    quality = [m.psnr for m in made]
    assert all(b > a + 1.0 for a, b in itertools.pairwise(quality))
    assert all(n - len(m.data) <= 2 for n, m in zip((16, 25, 40, 60), made, strict=True))


@pytest.mark.parametrize("size", [(7, 9), (17, 8), (1, 5)])
def test_what_tiles_have_beyond_a_picture_takes_no_bits(size):
    """The same picture, continued to whole tiles by the one who codes it."""
    codec, original = toy_codec(), picture(*size)
    tiles = [12 if side <= 12 else 23 for side in size]
    beyond = [(0, whole - side) for whole, side in zip(reversed(tiles), reversed(size), strict=True)]
    continued = codec.code(Image.fromarray(np.pad(np.asarray(original), beyond, mode="symmetric")), target_bytes=60)
    assert codec.code(original, target_bytes=60).psnr > psnr(original, continued.image.crop((0, 0, *size))) + 1.0


def test_where_tiles_overlap_they_share_the_bits(monkeypatch):
    codec, originals = toy_codec(), [picture(56, 45, seed=seed) for seed in range(3)]
    sharing = [codec.code(original, target_bytes=400).psnr for original in originals]
    monkeypatch.setattr(Layout, "_shares", lambda self, size: np.ones(1))
    alone = [codec.code(original, target_bytes=400).psnr for original in originals]
    assert sum(sharing) / 3 > sum(alone) / 3 + 0.1


def test_a_target_psnr_is_met_or_the_range_is_named():
    codec, met = toy_codec(), 0
    for seed in range(12):
        original, target = picture(12, 12, seed=seed), 23.0 + seed % 6
        made = codec.code(original, target_psnr=target)
        assert psnr(original, codec.decode(made.data)) == made.psnr >= target - 0.2
        met += made.psnr <= target + 0.2
    assert met >= 11  # of 144 values, one atom more is up to half a dB
    with pytest.raises(ConfigError, match=r"target_psnr=99 .* files of 12 to \d+ bytes give .* to .* dB"):
        codec.encode(Image.effect_noise((12, 12), 200), target_psnr=99)  # a smooth picture can be coded without loss
    with pytest.raises(ConfigError, match="not within reach"):
        codec.encode(picture(12, 12), target_psnr=1)


def test_prefixes_decode_ever_better():
    codec, original = toy_codec(), picture(12, 12)
    data = codec.encode(original, target_bytes=110)
    quality = [psnr(original, codec.decode(data[:n], strict=False)) for n in range(10, len(data) + 1, 4)]
    assert all(b > a - 0.5 for a, b in itertools.pairwise(quality))
    assert quality[-1] > quality[0] + 12 and quality[len(quality) // 2] > quality[0] + 5
    with pytest.raises(CodecError, match="is cut"):
        codec.decode(data[:-1])


def test_a_robust_file_loses_little_by_a_flipped_bit():
    codec, original = toy_codec(preset="fast"), picture(12, 12)
    data = codec.encode(original, target_bytes=90, robust=True)
    whole, head = psnr(original, codec.decode(data)), read_parts(data).header_bytes
    losses = []
    for bit in range(8 * (head + 30), 8 * (len(data) - 3), 17):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        losses.append(whole - psnr(original, codec.decode(bytes(flipped), strict=False)))
    assert np.mean(losses) < 1.5


def test_tokens_and_bytes_and_pictures_are_inverse_to_each_other():
    for codec, original in [(toy_codec(), picture(30, 20)), (toy_codec(12, 3), picture(12, 12, "RGB"))]:
        data = codec.encode(original, quality=40)
        tokens = codec.tokens(original, quality=40)
        assert tokens.ids.dtype == torch.int64 and tokens.ids.ndim == 1
        assert torch.equal(codec.tokens(data).ids, tokens.ids)
        assert codec.from_tokens(tokens) == data
        assert same(codec.decode(codec.from_tokens(tokens)), codec.code(original, quality=40).image)
    wrong = tokens.ids.clone()
    wrong[0] = 10**6
    with pytest.raises(ConfigError, match="tokens of step 0"):
        codec.from_tokens(type(tokens)(wrong, tokens.header))


@pytest.mark.parametrize(
    "plan",
    [
        paper_plan(12, 64),
        paper_plan(6, 64, atoms=3, coefficient_bits=2),
        paper_plan(12, 64, shared=True),
        Plan((-900, 0, 600), (4, 5), book="gaussian", size=300, seed=5),
        Plan((-900, 0, 600), (0, 5)),
    ],
)
@pytest.mark.parametrize("robust", [False, True])
def test_own_plans_travel_in_the_file(plan, robust):
    codec, original = toy_codec(), picture(12, 15)
    made = codec.code(original, plan=plan, robust=robust)
    assert read_parts(made.data).header.plan == plan
    assert same(codec.decode(made.data), made.image)
    # Without a preset the curve does not matter.
    other = Codec(smooth_model(), curve=Curve(tuple(range(81))))
    assert same(other.decode(made.data), made.image)


def test_weights_of_a_region_move_quality_there():
    codec, original = toy_codec(24), picture(24, 24)
    weights = np.ones((24, 24))
    weights[6:18, 6:18] = 4.0
    plain = np.asarray(codec.code(original, target_bytes=60).image, float)
    aimed_at = codec.code(original, target_bytes=60, roi=weights)
    error = [np.square(np.asarray(i, float) - np.asarray(original, float))[6:18, 6:18].mean()
             for i in (plain, aimed_at.image)]  # fmt: skip
    assert error[1] < 0.8 * error[0]
    assert same(codec.decode(aimed_at.data), aimed_at.image)
    with pytest.raises(ConfigError, match=r"shape \(24, 24\)"):
        codec.encode(original, roi=np.ones((3, 3)))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    original = picture(20, 12)
    path_like = __import__("io").BytesIO()
    original.save(path_like, "JPEG", exif=exif, quality=100)
    opened = Image.open(path_like)
    assert toy_codec().code(opened, quality=60).image.size == (12, 20)


def test_opaque_pictures_do_not_pay_for_their_alpha():
    rgb = picture(12, 12, "RGB")
    rgba = rgb.convert("RGBA")
    codec = toy_codec(12, 3)
    plain, opaque = codec.code(rgb, quality=50), codec.code(rgba, quality=50)
    assert len(plain.data) == len(opaque.data) and opaque.image.mode == "RGBA"
    assert opaque.image.getchannel("A").getextrema() == (255, 255)


def test_other_modes_are_converted_or_refused():
    codec = toy_codec()
    assert codec.code(picture(9, 9, "RGB").convert("P"), quality=20).image.mode == "RGB"
    assert codec.code(Image.new("1", (9, 9)), quality=20).image.mode == "L"
    with pytest.raises(DataError, match="8 bits"):
        codec.encode(Image.new("I;16", (9, 9)))


def test_contradictory_wishes_are_refused():
    codec, original = toy_codec(), picture(12, 12)
    with pytest.raises(ConfigError, match="give one of"):
        codec.encode(original, target_bytes=50, quality=3)
    with pytest.raises(ConfigError, match="between 1 and 100"):
        codec.encode(original, quality=0)
    with pytest.raises(ConfigError, match="at least 12 bytes"):
        codec.encode(original, target_bytes=11)
    assert len(codec.encode(original, target_bytes=12)) == 12
    with pytest.raises(ConfigError, match="calibrate"):
        Codec(network())
    with pytest.raises(ConfigError, match="did you mean 'fast'"):
        Codec(smooth_model(), preset="fats")


def test_another_model_is_refused_with_both_fingerprints():
    data = toy_codec().encode(picture(12, 12), quality=20)
    with pytest.raises(CodecError, match=r"another model: it wants [0-9a-f]{4}, .* is [0-9a-f]{4}"):
        toy_codec(14).decode(data)


def test_absurd_sizes_are_refused_before_anything_is_made():
    codec = toy_codec()
    data = bytearray(codec.encode(picture(12, 12), quality=20))
    huge = bytes(data[:7]) + b"\xff\xff\x7f" * 2 + bytes(data[9:])
    with pytest.raises(CodecError, match="allowed"):
        codec.decode(huge, strict=False)
    with pytest.raises(CodecError, match="allowed"):
        Codec(smooth_model(), max_pixels=100).encode(picture(12, 12))
    many = bytes(data[:7]) + b"\x80\x10" * 2 + bytes(data[9:])  # 2049 x 2049 for 40 bytes
    with pytest.raises(CodecError, match="tiles"):
        codec.decode(many, strict=False)


def test_batches_and_threads_do_not_change_a_bit():
    denoiser, curve = network(), Curve(tuple(40 * i for i in range(81)))
    original, threads, seen = picture(18, 12), torch.get_num_threads(), set()
    try:
        for batch, count, exact in [(1, 1, True), (3, 2, True), (16, 1, True), (1, 1, False), (7, 2, False)]:
            torch.set_num_threads(count)
            codec = Codec(denoiser, curve=curve, preset="fast", batch=batch)
            made = codec.code(original, quality=10, exact=exact)
            assert same(codec.decode(made.data), made.image)
            seen.add((exact, hashlib.sha256(made.data + made.image.tobytes()).hexdigest()))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 2


@pytest.mark.parametrize("exact", [False, True])
def test_autocast_around_the_codec_does_not_reach_the_network(exact):
    codec = Codec(network(), curve=Curve(tuple(40 * i for i in range(81))), preset="fast")
    original = picture(16, 16)
    plain = codec.code(original, quality=10, exact=exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = codec.code(original, quality=10, exact=exact)
    assert made.data == plain.data and same(made.image, plain.image)
    assert same(codec.decode(made.data), made.image)


def test_exact_mode_is_the_same_at_every_instruction_level_and_plain_float32_is_not():
    """Also in other processes, and with other numbers of threads and tiles per call."""
    program = Path(__file__).parent / "capability_probe.py"
    lines = []
    kinds = [("default", "Nehalem", 1, 16), ("avx2", "Haswell", 2, 3), ("avx512", "", 1, 1)]
    for capability, blas, threads, batch in kinds:
        # Passive: threads that wait for work leave the processor to others.
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_WAIT_POLICY": "passive"}
        environment |= {"OPENBLAS_CORETYPE": blas} if blas else {}
        command = [sys.executable, str(program), str(threads), str(batch)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines.append(result.stdout.split())
    pixels, files, plain = zip(*lines, strict=True)
    assert len(set(pixels)) == 1 and len(set(files)) == 1
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert len(set(plain)) > 1


def test_exact_mode_agrees_with_float32_and_refuses_what_it_does_not_know():
    from quintic.codec.exact import ExactArithmetic

    x = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
    for denoiser in (network(), smooth_model(16)):
        with torch.no_grad(), ExactArithmetic():
            exact = denoiser.predict_x0(x, 0.7)
        torch.testing.assert_close(exact, denoiser.predict_x0(x, 0.7), atol=2e-4, rtol=2e-4)
    with pytest.raises(CodecError, match="'cumsum'"), ExactArithmetic():
        x.cumsum(0)
    angles = torch.linspace(-40, 40, 999)
    with ExactArithmetic():
        sine, power = angles.sin(), angles.exp()
    torch.testing.assert_close(sine.double(), angles.double().sin(), atol=1e-7, rtol=0)
    torch.testing.assert_close(power.double(), angles.double().exp(), atol=0, rtol=1e-7)


def test_a_network_with_classes_too():
    arguments = {"shape": (1, 8, 8), "width": 8, "levels": 1, "blocks": 1, "patch": 2, "heads": 0, "num_classes": 3}
    denoiser = NetworkDenoiser(UNet(**arguments, seed=0), "x0", arguments)
    codec = Codec(denoiser, curve=Curve(tuple(range(81))), preset="fast")
    made = codec.code(picture(8, 8), quality=20, exact=True)
    assert same(codec.decode(made.data), made.image)


def test_the_shipped_model_codes_at_once():
    codec, original = Codec(), picture(28, 28)
    made = [codec.code(original, target_bytes=n) for n in (60, 200)]
    assert len(made[0].data) <= 60 and same(Codec().decode(made[0].data), made[0].image)
    assert made[1].psnr > made[0].psnr + 3.0


@pytest.mark.parametrize(
    "data,pixels",
    [
        (
            "ab514311089cf61b1b30a7f23a6020d9f8fa06b883dd421ae56fc093497701c91755c073157529fa081d911a15a74decfce0a6d3fc9192"
            "9813057f02",
            "0a6878c46e2fa02808965274cb53b33d1addc3fc188f88cf65b13324b71ee29e",
        ),
        (
            "ab514312089cf61b1b30276dc288cbf7d7a75c5e7d8b64b37d9e69298da607d65c147153646e1e3a5b196a9ce6703939fccc2ec1692505"
            "3418351b6d",
            "46fca3a75a35aba238feeec08afc5111ef406edb1298b84b18d800b9b054c35c",
        ),
        (
            "ab51431508788d1b1b301c55448b3effeab7b53475c3c92ab568506774fa423a937163e0fdbaa614c81b40aa57c186bae2bccbdfac4d51"
            "8fae394465",
            "cefb255176193c63491451e4707859ebbdbd0b23783a85b4c9c220c9d9ad886d",
        ),
        (
            "ab51431608788d1b1b261c5543a5be1cdac5ca54dea4d8e1edd7fb8862019bb6b6afc5c38211cdff7fe21ecabdb03eec54db",
            "7f8886953f0910975e3f88a5c32c28c25297642baef682071c1d7614e73b4fa7",
        ),
    ],
    ids=["1", "2", "5", "6"],
)
def test_files_of_older_presets_decode_as_they_did(data, pixels):
    """Written, exact: two before presets had more levels than calls, two before one was in single precision."""
    decoded = Codec().decode(bytes.fromhex(data))
    assert hashlib.sha256(decoded.tobytes()).hexdigest() == pixels


def cut_out(colour_beneath: int) -> Image.Image:
    """A disc of smooth colours whose surroundings are wholly transparent, noise of some strength beneath."""
    colours = np.asarray(picture(24, 24, "RGB"), dtype=float)
    down, across = np.mgrid[:24, :24] - 11.5
    alpha = np.clip(255.0 * (8.5 - np.hypot(down, across)), 0, 255)
    beneath = np.asarray(Image.effect_noise((24, 24), 200), dtype=float)[:, :, None] * (colour_beneath > 0)
    colours = np.where(alpha[:, :, None] > 0, colours, np.clip(beneath, 0, 255))
    return Image.fromarray(np.dstack([colours, alpha]).round().astype(np.uint8), "RGBA")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_cannot_be_seen_costs_nothing(channels):
    codec = toy_codec(12, channels)
    plain, noisy = (codec.code(cut_out(beneath), target_bytes=400) for beneath in (0, 1))
    assert plain.data == noisy.data and plain.psnr == noisy.psnr
    assert same(codec.decode(plain.data), plain.image)
    # The colours of the disc by themselves, with the alpha that was given.
    original, opaque = np.asarray(cut_out(0), dtype=float), cut_out(0).convert("RGB")
    inside = original[:, :, 3] == 255
    whole = codec.code(opaque, target_bytes=200 if channels == 3 else 300)
    error, before = (
        np.square(np.asarray(made.image, dtype=float)[inside, :3] - original[inside, :3]).mean()
        for made in (plain, whole)
    )
    assert error < 0.7 * before


def test_a_target_psnr_of_a_transparent_picture_is_of_what_is_seen():
    codec, original = toy_codec(12, 3), cut_out(1)
    made = codec.code(original, target_psnr=19)
    assert abs(made.psnr - 19) <= 0.2 and made.psnr == psnr(original, codec.decode(made.data))
