import math

import numpy as np
import pytest
from PIL import Image
from tests.codec.toys import picture

from quintic.codec import psnr
from quintic.codec.tiles import to_values
from quintic.codec.transparency import continue_colours, looks, seen


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_looks_are_what_pillow_shows_on_a_black_and_a_white_ground(mode):
    original = picture(31, 17, mode)
    for found, ground in zip(looks(original), ("black", "white"), strict=True):
        beneath = Image.new("RGBA", original.size, ground)
        shown = Image.alpha_composite(beneath, original.convert("RGBA")).convert("RGB")
        assert np.abs(found - np.asarray(shown, dtype=float)[:, :, : found.shape[2]]).max() <= 1.0


def test_the_psnr_of_transparent_pictures_counts_what_is_seen_and_no_more():
    a = np.zeros((4, 4, 4), dtype=np.uint8)
    a[:2] = 255
    b = a.copy()
    b[2:, :, :3] = 77  # beneath alpha 0
    pictures = [Image.fromarray(x, "RGBA") for x in (a, b)]
    assert psnr(*pictures) == math.inf
    b[:2, :, 3] = 204  # white, seen on black alone: by a fifth less, in half of the pixels
    error = (0.2 * 255) ** 2 / 4
    assert psnr(pictures[0], Image.fromarray(b, "RGBA")) == pytest.approx(10 * math.log10(255**2 / error))
    opaque, other = picture(9, 7, "RGB"), picture(9, 7, "RGB", seed=1)
    assert psnr(opaque.convert("RGBA"), other.convert("RGBA")) == pytest.approx(psnr(opaque, other))


def test_colours_go_on_beneath_what_is_transparent():
    values = to_values(picture(40, 23, "RGBA"))
    values[:, :, 3] = -1.0
    assert not continue_colours(values)[:, :, :3].any()
    values[8:15, 10:30, 3] = 1.0
    found = continue_colours(values)
    assert (found[8:15, 10:30] == values[8:15, 10:30]).all() and (found[:, :, 3] == values[:, :, 3]).all()
    visible = values[8:15, 10:30, :3]
    low, high = visible.min((0, 1)) - 1e-9, visible.max((0, 1)) + 1e-9
    assert (found[:, :, :3] >= low).all() and (found[:, :, :3] <= high).all()
    weights = seen(values)
    assert (weights[8:15, 10:30] == 1.0).all() and 0.0 < weights[0, 0] < 0.5
    sides = np.full((32, 32, 2), -1.0)
    sides[:, :8], sides[:, 24:] = (-0.5, 1.0), (0.5, 1.0)
    assert (continue_colours(sides)[:, :, 0] == np.repeat([-0.5, 0.5], 16)).all()
