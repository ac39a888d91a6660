"""``quintic codec restore``: a damaged picture restored and compressed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.codec_model import make_codec
from quintic.cli.picture_files import grey_picture, open_picture, png_bytes, target_paths
from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, suggest
from quintic.core.files import atomic_write

__all__ = ["check_bytes", "restore"]

SUFFIX = ".qdc"


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
        For enlarge: how many times larger.
    sigma
        For deblur: the width of the Gaussian blur, in pixels.
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

    Examples
    --------
    quintic codec restore grey.png --task colourise
    quintic codec restore torn.png --task inpaint --mask known.png
    """
    import numpy as np

    from quintic.codec.guidance import Blurred, Greyed, Masked, Operator, Shrunk
    from quintic.codec.tiles import to_values

    check_bytes([] if target_bytes is None else [target_bytes])
    tasks = ("inpaint", "enlarge", "colourise", "deblur")
    if task not in tasks:
        raise ConfigError(f"unknown task {task!r}{suggest(task, tasks)}")
    if task == "inpaint" and mask is None:
        raise ConfigError("--task inpaint needs --mask, a grey picture of the same size, white where pixels are known")
    if task != "inpaint" and mask is not None:
        raise ConfigError(f"--mask belongs to --task inpaint, found --task {task}")
    picture = open_picture(path)
    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema() != (255, 255):
        raise DataError(
            f"{path} is transparent, and only colours can be restored: lay it on a ground of one colour first, and put "
            "its alpha back behind"
        )
    grey = picture.mode in ("L", "LA") or task == "colourise"
    values = to_values(picture.convert("L" if grey else "RGB"))
    observed: Operator
    if task == "inpaint":
        assert mask is not None
        observed = Masked(values, np.asarray(grey_picture(mask)) > 127)
    elif task == "enlarge":
        observed = Shrunk(values, factor)
    elif task == "colourise":
        observed = Greyed(values)
    else:
        observed = Blurred(values, sigma)
    (coded,) = target_paths({path: Path(path.name)}, out, SUFFIX, overwrite)
    (restored,) = target_paths({coded: Path(coded.name)}, None, ".png" if coded == out else f".{task}.png", overwrite)
    made = make_codec(model, preset).restore(observed, target_bytes, quality)
    atomic_write(coded, made.data)
    atomic_write(restored, png_bytes(made.image))
    beyond = f"; more bytes do not help: {len(made.data)} of {len(made.data) + made.unused} used" if made.unused else ""
    say(f"{coded}: {len(made.data)} bytes{beyond}; {restored}")


def check_bytes(sizes: list[int]) -> None:
    """Refuse sizes that no file has.

    Raises:
        ConfigError: One is less than 1.
    """
    for size in sizes:
        if size < 1:
            raise ConfigError(f"a file has at least 1 byte, found {size}")
