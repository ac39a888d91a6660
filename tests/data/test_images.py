"""Pictures become arrays: idx files, folders, drawings; splits by group; every mistake named."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quintic.core import ConfigError, DataError
from quintic.data.drawings import SHAPES, draw
from quintic.data.images import ImageConfig, as_pixels, as_signed, image_grid, prepare_images


def write_idx(folder, part, images, labels, suffix=""):
    pack = gzip.compress if suffix else bytes
    header = struct.pack(">I3I", 0x803, *images.shape)
    (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(header + images.tobytes()))
    labels = np.asarray(labels, dtype=np.uint8)
    header = struct.pack(">II", 0x801, len(labels))
    (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(header + labels.tobytes()))


def idx_folder(folder, suffix="", n=40, size=(6, 8)):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (n + 10, *size)).astype(np.uint8)
    labels = np.arange(n + 10) % 4
    write_idx(folder, "train", images[:n], labels[:n], suffix)
    write_idx(folder, "t10k", images[n:], labels[n:], suffix)
    return images, labels


def save(path, size=(8, 8), colour=(255, 0, 0), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


# idx files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_keep_their_test_part_and_give_the_end_of_training_to_validation(tmp_path, suffix):
    images, labels = idx_folder(tmp_path, suffix)
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.25))
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 10)
    for split, start in ((data.train, 0), (data.validation, 30), (data.test, 40)):
        n = len(split)
        assert (split.images[..., 0] == images[start : start + n]).all()
        assert (split.labels == labels[start : start + n]).all()
    assert data.shape == (1, 6, 8)
    assert data.class_names == ("0", "1", "2", "3")


def test_idx_classes_and_licence_are_read_from_beside(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("shirt\ncoat\nboot\nbag\n")
    (tmp_path / "licence.txt").write_text("MIT\nand more words\n")
    data = prepare_images([tmp_path], ImageConfig())
    assert data.class_names == ("shirt", "coat", "boot", "bag")
    assert data.licence == "MIT"


def test_an_empty_test_part_of_idx_files_is_a_warning(tmp_path):
    images, labels = idx_folder(tmp_path)
    write_idx(tmp_path, "t10k", images[:0], labels[:0])
    data = prepare_images([tmp_path], ImageConfig(size=5))
    assert len(data.test) == 0 and data.class_names == ("0", "1", "2", "3")
    assert any("test split" in warning for warning in data.warnings)


def test_idx_images_are_scaled_and_coloured_on_request(tmp_path):
    idx_folder(tmp_path)
    data = prepare_images([tmp_path], ImageConfig(size=5, channels="rgb"))
    assert data.shape == (3, 5, 5)
    assert (data.train.images[..., 0] == data.train.images[..., 2]).all()


def test_damaged_idx_files_are_named(tmp_path):
    idx_folder(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content, words in (
        (whole[:-1], "should hold 1920 values"),
        (whole + b"x", "should hold 1920 values.*found 1921"),
        (b"PNG" + whole, "is not an idx file"),
        (gzip.compress(whole)[:-20], "cannot read"),
        (struct.pack(">I3I", 0x803, 2**31, 2**31, 2**31), "should hold"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=words):
            prepare_images([tmp_path], ImageConfig())
    file.unlink()
    with pytest.raises(DataError, match="has no train-images"):
        prepare_images([tmp_path], ImageConfig())


def test_idx_counts_must_agree(tmp_path):
    images, labels = idx_folder(tmp_path)
    write_idx(tmp_path, "train", images[:40], labels[:39])
    with pytest.raises(DataError, match="40 train images but 39 labels"):
        prepare_images([tmp_path], ImageConfig())


# folders of pictures


def test_the_first_subfolder_is_the_class(tmp_path):
    for i in range(40):
        save(tmp_path / "cat" / "old" / f"{i}.png")
        save(tmp_path / "dog" / f"{i}.jpg")
    save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    data = prepare_images([tmp_path], ImageConfig())
    assert data.class_names == ("cat", "dog")
    assert sum(len(s) for s in (data.train, data.validation, data.test)) == 80
    assert set(data.train.labels) == {0, 1}


def test_without_subfolders_there_are_no_labels(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i}.png")
    data = prepare_images([tmp_path], ImageConfig())
    assert data.class_names == () and data.train.labels is None


def test_emoji_variants_stay_together(tmp_path):
    tones = ("", "-1f3fb", "-1f3fc", "-1f3fd", "-1f3fe", "-1f3ff")
    for base in range(0x1F400, 0x1F440):
        for number, tone in enumerate(tones):
            save(tmp_path / f"{base:x}{tone}.png", size=(4, 4), colour=(base & 255, 0, number))
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.2, test_fraction=0.2))
    bases = [set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.validation, data.test)]
    assert all(bases)
    assert not (bases[0] & bases[1] or bases[0] & bases[2] or bases[1] & bases[2])
    assert sum(map(len, bases)) == 64
    assert data.notes["groups"].startswith("emoji")


def test_adding_a_file_moves_no_other(tmp_path):
    def members(data):
        return [{tuple(i.ravel()[:3]) for i in s.images} for s in (data.train, data.validation, data.test)]

    for i in range(60):
        save(tmp_path / f"picture {i}.png", colour=(i, 0, 9))
    before = members(prepare_images([tmp_path], ImageConfig()))
    for i in range(60, 90):
        save(tmp_path / f"a picture {i}.png", colour=(i, 0, 9))
    after = members(prepare_images([tmp_path], ImageConfig()))
    assert all(b <= a for b, a in zip(before, after, strict=True))


def test_test_groups_are_those_whose_crc_ends_in_zero(tmp_path):
    from zlib import crc32

    for i in range(100):
        save(tmp_path / f"{i} x.png", colour=(i, 0, 0))
    data = prepare_images([tmp_path], ImageConfig(test_fraction=0.1))
    expected = {i for i in range(100) if crc32(f"{i} x.png".encode()) % 10 == 0}
    assert {int(i[0, 0, 0]) for i in data.test.images} == expected


def test_validation_groups_are_those_whose_crc_ends_in_nines(tmp_path):
    from zlib import crc32

    for i in range(100):
        save(tmp_path / f"{i} x.png", size=(4, 4), colour=(i, 0, 0))
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.1, test_fraction=0.1))
    expected = {i for i in range(100) if crc32(f"{i} x.png".encode()) % 10 == 9}
    assert {int(i[0, 0, 0]) for i in data.validation.images} == expected
    assert len(data.train) + len(data.test) == 100 - len(expected)


def test_transparency_becomes_white_and_grey_is_found_out(tmp_path):
    save(tmp_path / "a.png", colour=(10, 20), mode="LA")
    save(tmp_path / "b.png", colour=200, mode="L")
    only_grey = ImageConfig(validation_fraction=0.0, test_fraction=0.0)
    data = prepare_images([tmp_path], only_grey)
    assert data.shape[0] == 1
    # 10 at an opacity of 20 of 255 over white.
    assert sorted(data.train.images[:, 0, 0, 0].tolist()) == [200, 236]
    save(tmp_path / "c.png", colour=(255, 0, 0, 0), mode="RGBA")
    data = prepare_images([tmp_path], only_grey)
    assert data.shape[0] == 3
    assert (data.train.images == 255).all(axis=(1, 2, 3)).any()
    assert prepare_images([tmp_path], ImageConfig(channels="grey")).shape[0] == 1


def test_black_and_white_is_grey(tmp_path):
    save(tmp_path / "a.png", colour=1, mode="1")
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.0, test_fraction=0.0))
    assert data.shape == (1, 8, 8) and (data.train.images == 255).all()


def test_a_picture_that_is_named_twice_counts_once(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    every = ImageConfig(validation_fraction=0.0, test_fraction=0.0)
    assert len(prepare_images([Path(), tmp_path / "a.png"], every).train) == 1


def test_one_name_of_an_emoji_among_others_makes_no_groups(tmp_path):
    for name in ("1f44b-1f3fd", "wave"):
        save(tmp_path / f"{name}.png")
    assert prepare_images([tmp_path], ImageConfig()).notes["groups"] == "every file by itself"


def test_pictures_are_turned_upright(tmp_path):
    picture = Image.new("L", (4, 6), 0)
    picture.paste(255, (0, 0, 4, 3))  # bright half on top
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees to the right
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.0, test_fraction=0.0))
    assert data.shape == (1, 4, 6)
    image = data.train.images[0, :, :, 0]
    assert image[:, :2].max() < 100 < 150 < image[:, 4:].min()


def test_unlike_sizes_need_a_size_and_are_cut_at_the_centre(tmp_path):
    save(tmp_path / "a.png", size=(8, 8))
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("blue", (12, 0, 20, 8))
    wide.save(tmp_path / "b.png")
    keep = ImageConfig(validation_fraction=0.0, test_fraction=0.0)
    with pytest.raises(DataError, match=r"2 different sizes .* data\.size=32"):
        prepare_images([tmp_path], keep)
    data = prepare_images([tmp_path], ImageConfig(size=8, validation_fraction=0.0, test_fraction=0.0))
    assert (data.train.images[1] == (0, 0, 255)).all()


def test_of_files_with_frames_the_first_is_taken_and_that_is_said(tmp_path):
    every = ImageConfig(validation_fraction=0.0, test_fraction=0.0)
    first = Image.new("L", (6, 4), 30)
    first.save(tmp_path / "still.png")
    first.save(tmp_path / "views.jpg", "MPO", save_all=True, append_images=[Image.new("L", (6, 4), 200)], quality=95)
    assert "frames" not in prepare_images([tmp_path], every).notes  # of a camera
    first.save(tmp_path / "moving.png", save_all=True, append_images=[Image.new("L", (6, 4), 200)])
    data = prepare_images([tmp_path], every)
    assert np.abs(data.train.images.astype(int) - 30).max() < 3
    assert data.notes["frames"] == "the first one of each of 1 files that have several"


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # half of its pixels, from where it is an error
    with pytest.raises(DataError, match=r"cannot read .*a\.png as a picture: Image size \(64 pixels\)"):
        prepare_images([tmp_path], ImageConfig())


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        prepare_images([tmp_path / "nowhere"], ImageConfig())
    with pytest.raises(DataError, match="no pictures in"):
        prepare_images([tmp_path], ImageConfig())
    (tmp_path / "a.png").write_bytes(b"this is not a picture")
    with pytest.raises(DataError, match=r"cannot read .*a\.png as a picture"):
        prepare_images([tmp_path], ImageConfig())
    save(tmp_path / "whole.png", size=(64, 64))
    (tmp_path / "a.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read .*a\.png"):
        prepare_images([tmp_path], ImageConfig())


def test_an_empty_split_is_a_warning(tmp_path):
    save(tmp_path / "a.png")
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.01, test_fraction=0.01))
    assert len(data.train) == 1 and len(data.test) == 0
    assert any("test split" in warning for warning in data.warnings)


def test_all_may_be_test(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png")
    data = prepare_images([tmp_path], ImageConfig(validation_fraction=0.0, test_fraction=1.0))
    assert (len(data.train), len(data.test)) == (0, 5)
    assert data.shape == (3, 8, 8) and not data.warnings


# drawings and examples


def test_drawings_are_the_same_everywhere_and_of_any_number():
    images, labels = draw(30, 32, 1, seed=0, label="train")
    more, _ = draw(50, 32, 1, seed=0, label="train")
    assert (more[:30] == images).all()
    assert not (draw(30, 32, 1, seed=1, label="train")[0] == images).all()
    assert labels.tolist() == list(range(10)) * 3
    # A record of the bytes: drawing is exact arithmetic, so any difference is a change of the data set.
    from quintic.core.files import sha256_bytes

    assert sha256_bytes(images.tobytes())[:16] == "649572f1cb62e5b6"


def test_drawn_shapes_can_be_told_apart_by_their_area():
    """A disc covers pi r^2; the shapes are what their names say only if a simple integral agrees."""
    from quintic.data.drawings import _distance

    axis = (np.arange(400) + 0.5) / 100 - 2.0
    u, v = np.meshgrid(axis, axis)
    area = {name: float((_distance(name, u, v) < 0).mean() * 16) for name in SHAPES}
    expected = {
        "disc": np.pi, "ring": np.pi * (1 - 0.25), "square": 1.7**2, "frame": 1.8**2 - 1.0, "bar": 2.2 * 0.6,
        "cross": 2 * 2 * 0.6 - 0.36, "pair": 2 * 2 * 0.5, "triangle": 3 * np.sqrt(3) * 0.55**2,
        "corner": 2 * 0.6 * 2 - 0.6**2,
    }  # fmt: skip
    for name, value in expected.items():
        assert area[name] == pytest.approx(value, rel=0.02), name
    assert 0 < area["crescent"] < area["disc"] / 2


def test_without_paths_shapes_are_drawn_and_labelled():
    data = prepare_images(None, ImageConfig(size=16, drawn=100, channels="rgb"))
    assert data.shape == (3, 16, 16)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 5, 10)
    assert data.class_names == SHAPES
    assert data.fingerprint == prepare_images(None, ImageConfig(size=16, drawn=100, channels="rgb")).fingerprint
    assert data.fingerprint != prepare_images(None, ImageConfig(size=16, drawn=110, channels="rgb")).fingerprint


def test_mirror_images_are_examples_of_their_own():
    data = prepare_images(None, ImageConfig(size=16, drawn=20, flip=True))
    assert data.num_examples == 40
    split = data.examples(np.array([3, 23]))
    assert (split.images[0] == data.train.images[3]).all()
    assert (split.images[1] == data.train.images[3, :, ::-1]).all()
    assert split.labels.tolist() == [3, 3]
    plain = prepare_images(None, ImageConfig(size=16, drawn=20))
    assert (data.train.images == plain.train.images).all()
    assert data.fingerprint != plain.fingerprint  # of the examples, which a resumed run must have again


def test_a_grid_is_white_where_images_end():
    grid = np.asarray(image_grid(np.zeros((3, 2, 4, 1), np.uint8), smallest=8))
    assert grid.tolist() == [[0] * 8] * 2 + [[0] * 4 + [255] * 4] * 2
    assert image_grid(np.zeros((3, 2, 4, 3), np.uint8), smallest=9).size == (16, 8)


def test_bytes_and_signed_numbers():
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    signed = as_signed(images)
    assert signed.shape == (2, 1, 8, 16) and signed.dtype == np.float32
    assert (signed.min(), signed.max()) == (-1.0, 1.0)
    assert (as_pixels(signed) == images).all()
    assert as_pixels(np.array([[[[-7.0, 7.0]]]], dtype=np.float32)).ravel().tolist() == [0, 255]


def test_settings_out_of_range_are_named():
    for wrong, words in (
        ({"size": 2}, "data.size"),
        ({"size": 1025}, "data.size"),
        ({"channels": "cmyk"}, "data.channels"),
        ({"test_fraction": -0.1}, "data.test_fraction"),
        ({"test_fraction": 0.6, "validation_fraction": 0.6}, "add up to more than 1"),
        ({"drawn": 0}, "data.drawn"),
    ):
        with pytest.raises(ConfigError, match=words):
            ImageConfig(**wrong)
