"""A picture in a hundred bytes: a diffusion model as an image code (DDCM), in ten lines.

The model that ships with the package knows small grey pictures of clothes. Encoding runs its reverse diffusion and
picks each step's noise from a codebook so that the picture comes out; the file is the list of picks. One sees the
bytes and the PSNR at a few budgets, and below which size PNG and JPEG cannot go for the same picture. Unless a picture
is given it is one that the model drew itself, which is its home ground: others cost more.

    python examples/image_codec.py [--picture FILE] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from quintic import Codec, NoiseSchedule, ancestral_sample, shipped_denoiser
from quintic.codec import psnr
from quintic.data.images import as_pixels


def one_garment() -> Image.Image:
    """A picture that the model draws."""
    levels = NoiseSchedule("cosine").grid(50)
    drawn = ancestral_sample(shipped_denoiser("fashion28"), 1, levels, seed=1)
    return Image.fromarray(as_pixels(drawn.numpy())[0, :, :, 0])


def least(picture: Image.Image, kind: str, **options: int) -> tuple[int, float]:
    """Bytes and PSNR of another format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.tell(), psnr(picture, Image.open(buffer).convert(picture.mode))


def main(argv: list[str] | None = None) -> None:
    """Encode at every budget, decode, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--budgets", type=int, nargs="+", default=[40, 80, 120])
    options = parser.parse_args(argv)
    picture = one_garment() if options.picture is None else Image.open(options.picture).convert("L")

    codec = Codec()
    for budget in options.budgets:
        data = codec.encode(picture, target_bytes=budget)
        decoded = codec.decode(data)
        decoded.save(options.out / f"decoded-{budget}.png")
        print(f"{len(data):4} bytes  {psnr(picture, decoded):5.2f} dB")
    print("JPEG at its lowest quality: {} bytes, {:.2f} dB".format(*least(picture, "JPEG", quality=1, optimize=True)))
    print("PNG, which loses nothing:   {} bytes".format(least(picture, "PNG", optimize=True)[0]))


if __name__ == "__main__":
    main()
