import itertools
import math

import numpy as np
import pytest
from PIL import Image
from tests.codec.toys import picture, toy_codec
from tests.data.test_pictures import swapped_profile

from quintic import Codec, shipped_denoiser
from quintic.codec import paper_plan, psnr
from quintic.codec.guidance import Masked, generate
from quintic.codec.known import SHIPPED, shipped_of
from quintic.codec.models import shipped_model
from quintic.codec.tiles import read_image, to_image, to_values
from quintic.core import ConfigError, DataError
from quintic.data.drawings import draw
from quintic.diffusion import shipped_names


def drawing():
    return Image.fromarray(draw(2, 28, 1, seed=0, label="post")[0][0, :, :, 0])


def sample():
    _, images = generate(shipped_denoiser("fashion28"), paper_plan(12, 64), count=1, seed=3)
    return to_image(images[0].transpose(1, 2, 0).astype(np.float64), "L")


@pytest.mark.parametrize("make", [drawing, sample])
def test_a_larger_budget_never_buys_a_worse_picture(make):
    codec, original = Codec(preset="fast"), make()
    made = [codec.code(original, target_bytes=size) for size in (120, 260, 700)]
    assert all(b.psnr > a.psnr - 0.2 for a, b in itertools.pairwise(made))
    assert made[0].unused == 0  # such a budget is used up, by one chain
    assert made[-1].unused == 700 - len(made[-1].data) > 0
    assert psnr(original, codec.decode(made[-1].data)) == made[-1].psnr


def test_quality_100_is_no_worse_than_quality_85():
    codec, original = Codec(preset="fast"), drawing()
    low, high = (codec.code(original, quality=quality) for quality in (85, 100))
    assert high.psnr > low.psnr - 0.2 and high.unused > 0


def test_a_picture_that_profits_from_its_bytes_gets_them():
    codec, original = toy_codec(), picture(12, 12)
    made = codec.code(original, target_bytes=80)  # some of these are tried
    assert made.unused == 0 and 76 <= len(made.data) <= 80
    beyond = codec.code(original, target_bytes=5000)
    assert len(beyond.data) < 1000 and beyond.unused == 5000 - len(beyond.data) and beyond.psnr > made.psnr


def test_of_what_is_restored_the_agreement_with_what_is_known_counts(monkeypatch):
    codec, original = Codec(preset="fast"), drawing()
    values = to_values(original)
    known = Masked(values, np.arange(28 * 28).reshape(28, 28) % 3 > 0)

    def error(size):
        made = codec.restore(known, target_bytes=size)
        assert math.isnan(made.psnr)
        return float(np.square(known.residual(to_values(made.image))).mean()), made.unused

    (searched, unused), _ = error(700), monkeypatch.setattr("quintic.codec.rate._SATED", 10**6)
    assert searched < 0.5 * error(700)[0] and unused > 0


def test_psnr_is_of_what_is_seen_and_of_one_size_and_mode():
    colours = picture(9, 8, "RGB").quantize(16)
    order = [*reversed(range(16))]
    assert psnr(colours, colours.remap_palette(order)) == math.inf
    assert psnr(colours, colours.convert("RGB")) == math.inf
    for other in (Image.new("L", (1, 1)), Image.new("RGB", (9, 8))):
        with pytest.raises(DataError, match=r"one size and mode, found 9 x 8 L and \d x \d"):
            psnr(picture(9, 8), other)


def test_without_a_word_quality_is_50():
    codec, original = toy_codec(), picture(12, 12)
    assert codec.encode(original) == codec.encode(original, quality=50) != codec.encode(original, quality=30)


def test_arguments_of_other_kinds_are_named(tmp_path):
    codec, original = toy_codec(), picture(12, 12)
    for wrong in (tmp_path / "x.png", np.zeros((12, 12), np.uint8), None):
        with pytest.raises(DataError, match="expected a picture of Pillow, found"):
            codec.encode(wrong)
    for wrong in (None, "x.qdc"):
        with pytest.raises(DataError, match="expected the bytes of a file, found"):
            codec.decode(wrong)
    data = codec.encode(original, target_bytes=40)
    assert codec.decode(bytearray(data)).tobytes() == codec.decode(data).tobytes()
    for wishes in ({"target_bytes": 80.5}, {"target_bytes": 0}, {"quality": 1.5}, {"target_psnr": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(wishes))):
            codec.encode(original, **wishes)
    with pytest.raises(ConfigError, match="batch = 0"):
        Codec(batch=0)


def test_the_models_of_this_package_are_known_without_being_loaded():
    assert sorted(SHIPPED) == sorted(shipped_names())
    for name, digests in SHIPPED.items():
        model = shipped_model(name)
        assert digests == (model.denoiser.fingerprint, model.curve.digest, model.curve.residuals.digest)
        assert {shipped_of(preset, model.fingerprint(preset)) for preset in (0, 1, 8)} == {name}
    assert shipped_of(8, b"??") is None


def test_one_transparent_colour_and_palettes_with_alpha_are_coded():
    codec, colours = toy_codec(), Image.new("RGB", (4, 4), (9, 9, 9))
    colours.putpixel((1, 1), (200, 0, 0))
    colours.info["transparency"] = 9, 9, 9
    grey = Image.new("L", (4, 4), 7)
    grey.info["transparency"] = 7
    palette = Image.new("PA", (4, 4))
    palette.putalpha(80)
    for original, mode in ((colours, "RGBA"), (grey, "LA"), (palette, "RGBA")):
        assert codec.decode(codec.encode(original, quality=5)).mode == mode
    assert read_image(colours)[0].getpixel((1, 1)) == (200, 0, 0, 255)
    assert read_image(colours)[0].getpixel((0, 0))[3] == read_image(grey)[0].getpixel((0, 0))[1] == 0
    assert read_image(palette)[0].getpixel((0, 0))[3] == 80


def test_colours_are_coded_as_they_are_seen():
    picture = Image.new("RGB", (4, 4), (255, 40, 40))
    picture.info["icc_profile"] = swapped_profile()
    assert read_image(picture)[0].getpixel((0, 0)) == pytest.approx((40, 40, 255), abs=1)
