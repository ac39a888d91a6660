"""The rows of JPEG and AVIF in the study of the codec."""

import json

import numpy as np
from benchmarks import codec
from benchmarks.__main__ import RESULTS
from benchmarks.codec_parts import smallest
from PIL import Image

from quintic.codec.comparison import classic_file, quality_of


def test_the_smallest_files_of_other_codecs_are_shown_where_they_were_measured():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8)
    made = {name: smallest(pixels, name) for name in ("webp", "jpeg")}
    picture = Image.fromarray(pixels[..., 0])
    for name, (data, quality) in made.items():
        assert len(data) <= len(classic_file(picture, name, 10)) and quality == quality_of(picture, data)

    result = json.loads((RESULTS / "codec.json").read_text(encoding="utf-8"))
    for model in result["models"].values():
        model.pop("classics", None)
    without = codec.claims(result)
    assert "JPEG, smallest" not in codec.section(result)
    for model in result["models"].values():
        model["classics"] = {"jpeg": {"bytes": 1.0, "psnr": 99.0}}
    with_them = codec.claims(result)
    new = [claim for claim in with_them if claim not in without]
    assert len(new) == len(result["models"]) == len(with_them) - len(without)
    assert all(claim.holds == "no" for claim in new)  # a file of one byte is beyond every codec
    assert codec.section(result).count("| JPEG, smallest | 1.0 | 99.00 dB |") == len(new)
    assert all("JPEG, smallest" in svg for svg in codec.plots(result).values())
