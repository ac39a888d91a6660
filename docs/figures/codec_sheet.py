"""``python -m docs.figures.codec_sheet``: pictures that the colour model never saw, and what a few dozen bytes keep.

Writes docs/images/codec.png. The pictures are emoji of the test split (``python -m benchmarks.fetch_data emoji``),
taken evenly, not chosen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from benchmarks.codec_parts import images, some
from PIL import Image

from quintic.codec import Codec

OUT = Path(__file__).parent.parent / "images" / "codec.png"
SIZES = (40, 80, 160)
COUNT, ZOOM, GAP = 12, 2, 2


def main() -> None:
    """Originals above, then a row for every size of file."""
    codec = Codec()
    pictures = [Image.fromarray(pixels) for pixels in some(images("emoji32"), COUNT)]
    rows = [pictures]
    for size in SIZES:
        made = [codec.code(picture, target_bytes=size) for picture in pictures]
        print(f"{size} bytes at most: {np.mean([m.psnr for m in made]):.1f} dB")
        rows.append([m.image for m in made])
    side = 32 * ZOOM + GAP
    sheet = Image.new("RGB", (COUNT * side - GAP, len(rows) * side - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB").resize((32 * ZOOM,) * 2, Image.Resampling.NEAREST), (x * side, y * side))
    sheet.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
