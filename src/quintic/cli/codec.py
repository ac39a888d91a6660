"""``quintic codec``: pictures to files of a few dozen bytes and back."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from quintic.cli.printing import say
from quintic.codec.container import MODES, read_parts
from quintic.codec.schedule import PRESETS
from quintic.core import ConfigError, DataError, UserError, suggest
from quintic.core.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from quintic.codec import Codec
    from quintic.codec.comparison import Rate

__all__ = ["app"]

SUFFIX = ".qdc"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

app = App(name="codec", help="Compress pictures with a diffusion model: encode, decode, info, eval, restore.")


@app.command
def encode(
    *paths: str,
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
    """Code pictures as .qdc files.

    Example: quintic codec encode photo.png --target-bytes 100

    Parameters
    ----------
    paths
        Pictures, folders, or patterns such as "shots/*.png".
    out
        A file for one picture, a folder for several. Default: beside each picture.
    target_bytes
        Largest size of a file, header and all.
    target_psnr
        Quality in dB, met within 0.2.
    quality
        1 to 100; 50 if nothing is said.
    preset
        standard (20 calls of the network), fast (10), fine (50), finest (100).
    exact
        Pixels that are the same on every processor; slower.
    robust
        A longer form in which a flipped bit does little harm.
    roi
        Grey picture of the same size: up to four times the weight where it is white.
    model
        A denoiser of your own (.safetensors); decoding needs the same.
    overwrite
        Replace files that exist.
    """
    files = _find(paths, PICTURES)
    targets = _targets(files, out, SUFFIX, overwrite)
    codec = _codec(model, preset)
    pixels = coded = 0
    for path, target in _progress(list(zip(files, targets, strict=True)), "encoding"):
        picture = _open(path)
        made = codec.code(
            picture, target_bytes, target_psnr, quality, exact=exact, robust=robust, roi=_roi(roi, picture)
        )
        atomic_write(target, made.data)
        pixels += made.image.width * made.image.height
        coded += len(made.data)
        say(f"{target}: {len(made.data)} bytes, {made.psnr:.2f} dB")
    if len(files) > 1:
        say(f"{len(files)} files, {coded} bytes, {8 * coded / pixels:.3f} bits per pixel")


@app.command
def decode(
    *paths: str,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    partial: bool = False,
    model: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Make PNG pictures of .qdc files.

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
    """
    files = _find(paths, (SUFFIX,))
    targets = _targets(files, out, ".png", overwrite)
    codec = _codec(model, "standard")
    failed = []
    for path, target in _progress(list(zip(files, targets, strict=True)), "decoding"):
        try:
            atomic_write(target, _png(codec.decode(path.read_bytes(), strict=not partial)))
        except UserError as error:
            if len(files) == 1:
                raise
            failed.append(path)
            say(f"{path}: {error}")
            continue
        say(f"{target}")
    if failed:
        raise DataError(f"{len(failed)} of {len(files)} files could not be decoded; the others are there")


@app.command
def info(*paths: str, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Say what is in .qdc files; needs no model.

    Parameters
    ----------
    paths
        Files, folders or patterns.
    as_json
        One JSON object a line.
    """
    for path in _find(paths, (SUFFIX,)):
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
            "model": h.fingerprint.hex(),
            "exact": h.exact,
            "robust": h.robust,
            "state": "whole" if parts.intact else "checksum wrong" if parts.complete else "cut, or too long",
        }
        if as_json:
            say(json.dumps(facts))
            continue
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in facts.items():
            table.add_row(name.replace("_", " "), str(value))
        Console().print(table)


@app.command(name="eval")
def evaluate(
    *paths: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("codec-eval"),
    sizes: list[int] | None = None,
    limit: int = 100,
    preset: str = "standard",
    model: Path | None = None,
) -> None:
    """Rate and distortion against JPEG, WebP and AVIF, by the real sizes of files.

    Writes rates.json, a table in Markdown and a page with a plot.

    Parameters
    ----------
    paths
        Pictures, folders or patterns.
    out
        Folder for the results.
    sizes
        Bytes to aim at, repeat for each; default: 40 60 80 100 150 200.
    limit
        At most so many pictures, evenly taken.
    preset
        As for encode.
    model
        As for encode.
    """
    from quintic.codec.comparison import compare, rates_table

    files = _find(paths, PICTURES)
    files = files[:: max(1, -(-len(files) // limit))]
    codec = _codec(model, preset)
    pictures = [_open(path) for path in files]
    rows = compare(codec, _progress(pictures, "comparing"), sizes or [40, 60, 80, 100, 150, 200])
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "rates.json", json.dumps([row.__dict__ for row in rows], indent=1))
    table = rates_table(rows)
    atomic_write(out / "rates.md", table + "\n")
    atomic_write(out / "rates.html", _page(rows))
    say(table)
    say(f"{len(files)} pictures; {out / 'rates.html'}, {out / 'rates.md'}, {out / 'rates.json'}")


@app.command
def restore(
    path: Path,
    *,
    task: str,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    mask: Path | None = None,
    factor: int = 2,
    sigma: float = 1.5,
    target_bytes: int | None = None,
    quality: int | None = None,
    preset: str = "standard",
    model: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Restore a damaged picture and compress it at once; writes a .qdc file and a PNG.

    Parameters
    ----------
    path
        The damaged picture.
    task
        inpaint, enlarge, colourise or deblur.
    out
        The .qdc file; the PNG stands beside it. Default: beside the picture.
    mask
        For inpaint: grey picture of the same size, white where pixels are known.
    factor
        For enlarge.
    sigma
        For deblur: of the Gaussian blur, in pixels.
    target_bytes
        Largest size of the file.
    quality
        1 to 100, if target_bytes is not given.
    preset
        As for encode.
    model
        As for encode.
    overwrite
        Replace files that exist.
    """
    import numpy as np

    from quintic.codec.guidance import Blurred, Greyed, Masked, Operator, Shrunk
    from quintic.codec.tiles import to_values

    tasks = ("inpaint", "enlarge", "colourise", "deblur")
    if task not in tasks:
        raise ConfigError(f"unknown task {task!r}{suggest(task, tasks)}")
    if (mask is not None) != (task == "inpaint"):
        raise ConfigError("--mask belongs to --task inpaint, which needs it")
    picture = _open(path)
    grey = picture.mode in ("1", "L", "LA") or task == "colourise"
    values = to_values(picture.convert("L" if grey else "RGB"))
    observed: Operator
    if task == "inpaint":
        assert mask is not None
        observed = Masked(values, np.asarray(_open(mask).convert("L")) > 127)
    elif task == "enlarge":
        observed = Shrunk(values, factor)
    elif task == "colourise":
        observed = Greyed(values)
    else:
        observed = Blurred(values, sigma)
    targets = [_targets([path], out, suffix, overwrite)[0] for suffix in (SUFFIX, f".{task}.png")]
    if out is not None:
        targets[1] = out.with_suffix(".png")
    made = _codec(model, preset).restore(observed, target_bytes, quality)
    atomic_write(targets[0], made.data)
    atomic_write(targets[1], _png(made.image))
    say(f"{targets[0]}: {len(made.data)} bytes; {targets[1]}")


def _page(rows: list[Rate]) -> str:
    """Plot and table."""
    import numpy as np

    from quintic.report.charts import Series, line_chart
    from quintic.report.html import document

    names = dict.fromkeys(row.codec for row in rows)
    series = []
    for number, name in enumerate(names):
        points = sorted((row.bytes, row.psnr) for row in rows if row.codec == name)
        x, y = np.array(points).T
        series.append(Series(name, x, y, strength=1.0 - 0.22 * number))
    label = "PSNR against the mean size of files"
    chart = line_chart(series, unit="dB", label=label, tall=True, x_name="bytes")
    cells = "".join(
        f"<tr><td>{row.codec}</td><td>{row.setting}</td><td>{row.bytes:.1f}</td><td>{row.psnr:.2f}</td></tr>"
        for row in rows
    )
    head = "<tr><th>codec</th><th>setting</th><th>bytes</th><th>dB</th></tr>"
    return document("Rate and distortion", f"<h1>Rate and distortion</h1>{chart}<table>{head}{cells}</table>")


def _find(paths: Iterable[str], suffixes: tuple[str, ...]) -> list[Path]:
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.name.lower().endswith(suffixes) and p.is_file()]
            if not inside:
                raise DataError(f"no {' '.join(suffixes)} files in {path}")
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(Path(name) for name in glob.glob(text, recursive=True))
            if not inside:
                raise DataError(f"no such file or folder: {text}")
        found |= dict.fromkeys(inside)
    if not found:
        raise ConfigError("name at least one file, folder or pattern")
    return list(found)


def _targets(files: list[Path], out: Path | None, suffix: str, overwrite: bool) -> list[Path]:
    if out is None:
        targets = [path.with_suffix(suffix) for path in files]
    elif len(files) == 1 and not out.is_dir() and out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        targets = [out]
    else:
        out.mkdir(parents=True, exist_ok=True)
        targets = [out / path.with_suffix(suffix).name for path in files]
    if len(set(targets)) < len(targets):
        raise ConfigError("two of the files would be written to the same place; code them apart")
    if not overwrite and (there := next((t for t in targets if t.exists()), None)):
        raise ConfigError(f"{there} exists; --overwrite replaces it")
    return targets


def _codec(model: Path | None, preset: str) -> Codec:
    from quintic.codec import Codec

    if model is None:
        return Codec(preset=preset)
    from quintic.diffusion import load_denoiser

    return Codec(load_denoiser(model), preset=preset)


def _open(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, SyntaxError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {path} as a picture: {error}") from error


def _roi(path: Path | None, picture: Image.Image) -> Any:
    if path is None:
        return None
    import numpy as np

    mask = np.asarray(_open(path).convert("L"), dtype=np.float64)
    if mask.shape != (picture.height, picture.width):
        raise ConfigError(f"{path} has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {picture.size}")
    return 1.0 + 3.0 * mask / 255.0


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _progress(items: list[Any], words: str) -> Iterable[Any]:
    console = Console(stderr=True)
    if len(items) < 2 or not console.is_terminal:
        return items
    return track(items, words, console=console, transient=True)
