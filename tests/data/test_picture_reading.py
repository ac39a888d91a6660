"""One picture file: damaged ones are named, and 16 bits become 8 by one rule."""

import io

import numpy as np
import pytest
from PIL import Image
from tests.data.test_pictures import swapped_profile

from quintic.core import DataError
from quintic.data.images import ImageConfig, prepare_images
from quintic.data.picture_reading import read_picture

EVERY = ImageConfig(validation_fraction=0.0, test_fraction=0.0)


def with_text_for_a_width():
    """A JPEG that is to be turned, and whose width in the camera's notes is marked as text."""
    exif = Image.Exif()
    exif[0x0100], exif[0x0112] = 70000, 6
    notes = bytearray(exif.tobytes())
    at = notes.index(b"\x01\x00", 8) + 2
    notes[at : at + 2] = b"\x00\x02"
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", exif=bytes(notes))
    return file.getvalue()


def with_a_second_frame_of_no_size():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF")
    data = bytearray(file.getvalue() + bytes(len(file.getvalue()) % 2))
    first = int.from_bytes(data[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    data[end : end + 4] = len(data).to_bytes(4, "little")  # where the next frame is said to begin
    return bytes(data) + bytes(6)


@pytest.mark.parametrize("damaged", [with_text_for_a_width, with_a_second_frame_of_no_size])
def test_whatever_a_damaged_file_makes_of_its_reader_it_is_named(tmp_path, damaged):
    (tmp_path / "a.png").write_bytes(damaged())
    with pytest.raises(DataError, match=r"cannot read .*a\.png as a picture: .") as told:
        read_picture(tmp_path / "a.png")
    assert str(told.value).count("cannot read") == 1


@pytest.mark.parametrize(("kind", "order"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
def test_sixteen_bits_are_divided_by_257_and_rounded(tmp_path, kind, order):
    every = np.arange(65536).reshape(256, 256)
    Image.fromarray(every.astype(order)).save(tmp_path / f"a.{kind}")
    data = prepare_images([tmp_path], EVERY)
    assert np.array_equal(data.train.images[0, :, :, 0], np.round(every / 257))
    assert data.notes["bits"] == "1 grey files of 16 bits, divided by 257 to have 8"
    assert prepare_images([tmp_path], ImageConfig(4)).shape == (1, 4, 4)


def test_what_has_an_unknown_range_is_told_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    for old, array in (("f.tif", values), ("i.tif", np.int32(values * 4))):
        Image.fromarray(array).save(old)
        with pytest.raises(
            DataError, match=rf"{old} as a picture: it has 32 bits a pixel \(mode [IF]\), whose range is not known"
        ) as told:
            prepare_images([tmp_path / old], EVERY)
    import PIL.Image

    command = str(told.value).split(" by ")[1]
    eval(command, {"PIL": PIL, "old": "f.tif", "new": "g.png"})
    assert read_picture(tmp_path / "g.png").image.tobytes() == bytes([0, 63, 127, 255])


def test_files_that_cannot_be_read_are_left_out_where_that_is_allowed(tmp_path):
    for name, content in (("cat/a.png", b"nothing"), ("dog/b.png", b"nothing"), ("cat/c.png", None)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content:
            (tmp_path / name).write_bytes(content)
        else:
            Image.new("L", (8, 8), 9).save(tmp_path / name)
    told = []
    data = prepare_images([tmp_path], EVERY, unreadable=lambda error: told.append(str(error)))
    assert data.train.files == (str(tmp_path / "cat" / "c.png"),) and data.train.labels.tolist() == [0]
    assert data.class_names == ("cat",)
    assert len(told) == 2 and "a.png" in told[0] and "b.png" in told[1]
    with pytest.raises(DataError, match=r"cannot read .*a\.png"):
        prepare_images([tmp_path], EVERY)
    (tmp_path / "cat" / "c.png").unlink()
    with pytest.raises(DataError, match="cannot read"):
        prepare_images([tmp_path], EVERY, unreadable=lambda error: None)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_that_the_profile_of_the_file_says(tmp_path, mode):
    picture = Image.new("RGBA", (4, 4), (255, 40, 40, 255))
    picture.paste((0, 0, 0, 0), (2, 0, 4, 4))
    if mode == "RGB":
        picture = picture.convert("RGB")
    elif mode == "P":
        picture = picture.quantize(4)
    picture.save(tmp_path / "a.png", icc_profile=swapped_profile())
    read = read_picture(tmp_path / "a.png").image
    assert read.mode == "RGB" and read.getpixel((0, 0)) == pytest.approx((40, 40, 255), abs=2)
    assert read.getpixel((3, 0)) == pytest.approx((0, 0, 0) if mode == "RGB" else (255, 255, 255), abs=1)


def test_a_damaged_profile_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", icc_profile=b"nothing" * 40)
    with pytest.raises(DataError, match=r"cannot read .*a\.png as a picture: .*colour profile is damaged"):
        read_picture(tmp_path / "a.png")
