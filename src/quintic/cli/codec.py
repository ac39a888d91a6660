"""``quintic codec``: pictures to files of a few dozen bytes and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.codec_model import make_codec, model
from quintic.cli.codec_restore import check_bytes, restore
from quintic.cli.picture_files import (
    each_file,
    find_files,
    grey_picture,
    open_picture,
    png_bytes,
    progress,
    target_paths,
)
from quintic.cli.printing import say
from quintic.core import ConfigError
from quintic.core.files import PICTURES, atomic_write, check_folder

if TYPE_CHECKING:
    from PIL import Image

    from quintic.codec import Header

__all__ = ["app"]

SUFFIX = ".qdc"
_EXAMPLES = 4  # pictures shown on the page of an evaluation

app = App(name="codec", help="Compress pictures with a diffusion model: encode, decode, info, eval, restore, model.")
app.command(restore)
app.command(model)


@app.command
def encode(
    *paths: str | Path,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    target_bytes: int | None = None,
    target_psnr: float | None = None,
    quality: int | None = None,
    preset: str = "standard",
    exact: bool = False,
    robust: bool = False,
    roi: Path | None = None,
    model: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Encode pictures as .qdc files.

    Parameters
    ----------
    paths
        Pictures, folders, or patterns such as "shots/*.png".
    out
        A file for one picture, a folder for several. Default: beside each picture.
    target_bytes
        Largest size of a file, header and all; less where more would make the picture no better.
    target_psnr
        Quality in dB, met within 0.2, or exceeded where the next smaller file misses it.
    quality
        1 to 100; 50 if neither this nor a target is given.
    preset
        standard (20 calls of the network), fast (10), fine (50), finest (100).
    exact
        Pixels that are the same on every processor; slower.
    robust
        Write a longer file, in which a flipped bit does little harm.
    roi
        Grey picture of the same size: up to four times the weight where it is white.
    model
        A model of your own, made by "quintic codec model"; decoding needs the same.
    overwrite
        Replace files that exist.

    Examples
    --------
    quintic codec encode photo.png --target-bytes 100
    quintic codec encode shots/ --quality 70 --out coded/
    quintic codec encode "shots/*.png" --target-psnr 30 --exact
    """
    check_bytes([] if target_bytes is None else [target_bytes])
    if sum(aim is not None for aim in (target_bytes, target_psnr, quality)) > 1:
        raise ConfigError("give only one of --target-bytes, --target-psnr and --quality")
    files = find_files(paths, PICTURES)
    targets = target_paths(files, out, SUFFIX, overwrite)
    codec = make_codec(model, preset)
    pixels = coded = 0

    def code(path: Path, target: Path) -> None:
        nonlocal pixels, coded
        picture = open_picture(path)
        made = codec.code(
            picture, target_bytes, target_psnr, quality, exact=exact, robust=robust, roi=_roi(roi, picture)
        )
        atomic_write(target, made.data)
        pixels += made.image.width * made.image.height
        coded += len(made.data)
        beyond = f"; more bytes do not help: {len(made.data)} of {len(made.data) + made.unused} used"
        say(f"{target}: {len(made.data)} bytes, {made.psnr:.2f} dB{beyond if made.unused else ''}")
        if len(made.data) > (before := path.stat().st_size):
            say(
                f"{target} is larger than {path}, which has {before} bytes: this codec is for a few dozen or hundred "
                "bytes a picture; --target-bytes asks for fewer",
                console=Console(stderr=True), style="yellow",
            )  # fmt: skip

    each_file(_pairs(files, targets), code, "encoding", "pictures could not be coded; the others are there")
    if len(files) > 1:
        say(f"{len(files)} files, {coded} bytes, {8 * coded / pixels:.3f} bits per pixel")


@app.command
def decode(
    *paths: str | Path,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    partial: bool = False,
    model: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Decode .qdc files to PNG pictures.

    Parameters
    ----------
    paths
        Files, folders or patterns.
    out
        A file for one, a folder for several. Default: beside each file.
    partial
        Also decode files that are cut or damaged, as far as they go.
    model
        The denoiser they were coded with, if it is not one of this package.
    overwrite
        Replace files that exist.

    Examples
    --------
    quintic codec decode photo.qdc --out photo.png
    quintic codec decode coded/ --out back/
    """
    files = find_files(paths, (SUFFIX,))
    targets = target_paths(files, out, ".png", overwrite)
    codec = make_codec(model, "standard")

    def picture(path: Path, target: Path) -> None:
        atomic_write(target, png_bytes(codec.decode(path.read_bytes(), strict=not partial)))
        say(f"{target}")

    each_file(_pairs(files, targets), picture, "decoding", "files could not be decoded; the others are there")


@app.command
def info(*paths: str | Path, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Show what is in .qdc files; needs no model.

    Parameters
    ----------
    paths
        Files, folders or patterns.
    as_json
        Print one JSON object per line and file.

    Examples
    --------
    quintic codec info photo.qdc
    quintic codec info coded/ --json
    """
    from quintic.codec.container import MODES, read_parts
    from quintic.codec.schedule import PRESETS

    def show(path: Path) -> None:
        data = path.read_bytes()
        parts = read_parts(data, strict=False)
        h = parts.header
        facts: dict[str, Any] = {
            "file": str(path),
            "bytes": len(data),
            "width": h.width,
            "height": h.height,
            "mode": MODES[h.mode],
            "bits_per_pixel": round(8 * len(data) / (h.width * h.height), 4),
            "header_bytes": parts.header_bytes,
            "code_bytes": h.payload,
            "preset": PRESETS[h.preset].name if h.preset else "plan of its own",
            "calls": h.plan.calls if h.plan else PRESETS[h.preset].calls,
            "model": _model_name(h),
            "fingerprint": h.fingerprint.hex(),
            "exact": h.exact,
            "robust": h.robust,
            "state": "whole" if parts.intact else "checksum wrong" if parts.complete else "cut, or too long",
        }
        if as_json:
            say(json.dumps(facts))
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in facts.items():
            table.add_row(name.replace("_", " "), str(value))
        Console().print(table)

    each_file([(path,) for path in find_files(paths, (SUFFIX,))], show, "reading", "files could not be read")


@app.command(name="eval")
def evaluate(
    *paths: str | Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("codec-eval"),
    sizes: list[int] | None = None,
    limit: int = 100,
    preset: str = "standard",
    model: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare rate and distortion with JPEG, WebP and AVIF, by the real sizes of files.

    Writes rates.json, a table in Markdown and a page with plot, pictures and tables.

    Parameters
    ----------
    paths
        Pictures, folders or patterns.
    out
        Folder for the results.
    sizes
        Bytes to aim at, repeat for each; default: 40 60 80 100 150 200.
    limit
        Use at most this many pictures, evenly spaced among those given.
    preset
        As for encode.
    model
        As for encode.
    as_json
        Print the rates as JSON instead of a table.

    Examples
    --------
    quintic codec eval shots/ --sizes 60 --sizes 100 --out runs/rates
    quintic codec eval shots/ --json
    """
    from quintic.codec.comparison import compare, rates_table
    from quintic.codec.tiles import read_image
    from quintic.report.rates import Example, write_rates_report

    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, found {limit}")
    check_bytes(sizes or [])
    check_folder(out)
    files = list(find_files(paths, PICTURES))
    files = files[:: max(1, -(-len(files) // limit))]
    codec = make_codec(model, preset)
    aims = sorted(set(sizes or [40, 60, 80, 100, 150, 200]))
    at = files[0]

    def pictures() -> Iterator[Image.Image]:
        nonlocal at
        for at in progress(files, "comparing"):
            yield open_picture(at)

    try:
        rows = compare(codec, pictures(), aims)
    except ConfigError as error:  # a size that is too small for the picture
        raise ConfigError(f"{at}: {error}") from error
    shown = sorted({aims[0], aims[len(aims) // 2], aims[-1]})
    examples = []
    for path in files[:_EXAMPLES]:
        picture = open_picture(path)
        made = [codec.code(picture, target_bytes=size) for size in shown]
        examples.append(Example(read_image(picture)[0], [(len(m.data), m.psnr, m.image) for m in made]))
    page = write_rates_report(out, rows, examples)
    if as_json:
        say(json.dumps([asdict(row) for row in rows]))
        return
    say(rates_table(rows))
    say(f"{len(files)} pictures; report: {page}, with rates.md and rates.json beside it")


def _model_name(header: Header) -> str:
    from quintic.codec.known import shipped_of

    name = shipped_of(header.preset, header.fingerprint)
    return f"{name}, which comes with this package" if name else "not one of this package; give it with --model"


def _pairs(files: Iterable[Path], targets: list[Path]) -> list[tuple[Path, ...]]:
    return list(zip(files, targets, strict=True))


def _roi(path: Path | None, picture: Image.Image) -> Any:
    if path is None:
        return None
    import numpy as np

    mask = np.asarray(grey_picture(path), dtype=np.float64)
    if mask.shape != (picture.height, picture.width):
        raise ConfigError(
            f"{path} has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {picture.width} x {picture.height}"
        )
    return 1.0 + 3.0 * mask / 255.0
