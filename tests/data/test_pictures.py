import struct

import pytest
from PIL import Image, ImageCms

from quintic.core import DataError
from quintic.data.pictures import to_srgb, upright


def swapped_profile():
    """sRGB with the primaries of red and blue exchanged, under the old name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {}
    for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12):
        places[bytes(data[at : at + 4])] = at + 4
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    data[red : red + 8], data[blue : blue + 8] = data[blue : blue + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_another_profile_become_those_that_are_seen(mode):
    colour = (255, 40, 40, 77)[: len(mode)]
    picture = Image.new(mode, (3, 2), colour)
    picture.info["icc_profile"] = swapped_profile()
    made = to_srgb(picture)
    assert made.mode == mode and made.getpixel((0, 0)) == pytest.approx((40, 40, 255, 77)[: len(mode)], abs=1)
    assert to_srgb(made) is made


def test_a_profile_of_srgb_changes_nothing_and_a_grey_picture_stays_grey():
    picture = Image.new("RGB", (2, 2), (10, 200, 30))
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert to_srgb(picture) is picture
    grey = Image.new("LA", (2, 2), (104, 9))
    grey.info["icc_profile"] = swapped_profile()
    assert (to_srgb(grey).mode, to_srgb(grey).getpixel((0, 0))) == ("LA", (104, 9))


@pytest.mark.parametrize("mode", ["YCbCr", "RGBX", "RGBa", "1"])
def test_a_profile_holds_for_what_else_a_picture_is_stored_as(mode):
    picture = Image.new("RGBA" if mode == "RGBa" else "RGB", (2, 2), (255, 40, 40)).convert(mode)
    picture.info["icc_profile"] = swapped_profile()
    made = to_srgb(picture)
    assert made.mode == {"RGBa": "RGBA", "1": "L"}.get(mode, "RGB")
    if mode != "1":
        assert made.getpixel((0, 0))[:3] == pytest.approx((40, 40, 255), abs=2)


def test_profiles_that_are_damaged_or_of_other_colours_are_named():
    picture = Image.new("RGB", (2, 2))
    picture.info["icc_profile"] = b"no profile"
    with pytest.raises(DataError, match=r"colour profile is damaged .* save it as sRGB"):
        to_srgb(picture)
    ink = Image.new("CMYK", (2, 2))
    ink.info["icc_profile"] = swapped_profile()
    with pytest.raises(DataError, match="profile is of RGB, the picture of CMYK"):
        to_srgb(ink)


def test_damaged_exif_is_named():
    picture = Image.new("L", (2, 2))
    picture.info["exif"] = b"Exif\0\0MM\0*\0"
    with pytest.raises(DataError, match="which side of it is up"):
        upright(picture)
