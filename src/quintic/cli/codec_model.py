"""``quintic codec model``: any denoiser as one file that the codec takes, its errors measured once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, suggest
from quintic.core.files import check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quintic.codec import Codec
    from quintic.diffusion.denoiser import Denoiser

__all__ = ["make_codec", "model"]

_FEW = 100
"""Pictures, fewer than which make curves uncertain."""


def model(
    source: Path,
    /,
    *arguments: str | Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    limit: int = 500,
    checkpoint: str = "best",
    overwrite: bool = False,
) -> None:
    """Make a file of a diffusion model for --model: measures its errors once, on pictures it was not trained on.

    Parameters
    ----------
    source
        A run of task ddpm, a folder of diffusers, a .pt state dict of OpenAI's repositories, or a .safetensors of this
        package.
    arguments
        Pictures to measure on: files, folders or idx files; a run has its own, those of its validation split. Behind a
        state dict also the flags of its README, such as image_size=32; behind a folder of diffusers without a
        scheduler, scheduler=FOLDER.
    out
        The file, .safetensors.
    limit
        Measure on at most this many pictures, evenly spaced.
    checkpoint
        Of a run: best (lowest validation loss), last, or a step number.
    overwrite
        Replace a file that exists.

    Examples
    --------
    quintic codec model runs/pictures --out mine.safetensors
    quintic codec model ddpm-cifar10-32/ photos/ --out cifar.safetensors
    quintic codec model net.pt photos/ image_size=64 --out net.safetensors
    """
    from quintic.cli.wiring import split_arguments
    from quintic.codec import save_foreign, save_model

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, found {limit}")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; --overwrite replaces it")
    check_folder(out.parent)
    paths, words = split_arguments(arguments)
    options = _options(words)
    denoiser, own = _read(source, checkpoint, options)
    images = own() if not paths and own is not None else _pictures(paths, denoiser, source)
    images = images[:: max(1, -(-len(images) // limit))]
    if len(images) < _FEW:
        say(
            f"measured on {len(images)} pictures only; some hundreds make better files",
            console=Console(stderr=True), style="yellow",
        )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    if (source.is_dir() and own is None) or source.suffix in (".pt", ".pth"):
        save_foreign(source, images, out, **options)
    else:
        save_model(denoiser, images, out)
    c, h, w = denoiser.shape
    say(f"{out}: a model of {w} x {h} pictures, {'grey' if c == 1 else 'in colour'}, measured on {len(images)}")
    say(f"next: quintic codec encode picture.png --model {out}")


def make_codec(path: Path | None, preset: str) -> Codec:
    """The codec of ``--model``; None takes the shipped models."""
    from quintic.codec import Codec

    if path is None:
        return Codec(preset=preset)
    from quintic.codec import load_model
    from quintic.codec.models import as_model

    made = f"make a file for --model of it: quintic codec model {path}"
    if _is_run(path):
        raise ConfigError(
            f"{path} is a run, and a codec needs to know its errors as well; {made} --out mine.safetensors"
        )
    if path.is_dir() or path.suffix in (".pt", ".pth"):
        raise ConfigError(f"the errors of {path} have not been measured; {made} PICTURES --out mine.safetensors")
    denoiser, curve = load_model(path)
    try:
        as_model(denoiser, curve)
    except ConfigError as error:
        raise ConfigError(
            f"{path} does not say how large the errors of its model are; {made} PICTURES --out mine.safetensors"
        ) from error
    return Codec(denoiser, curve=curve, preset=preset)


def _is_run(path: Path) -> bool:
    return (path / "config.toml").is_file()


def _options(words: list[str]) -> dict[str, Any]:
    """Options of a reader; flags of OpenAI's as the types that they have."""
    from quintic.diffusion.openai import OpenAIFlags

    fields = {name: type(field.default) for name, field in OpenAIFlags.__dataclass_fields__.items()}
    options: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        kind = fields.get(name, str)
        if name not in (*fields, "scheduler"):
            raise ConfigError(f"unknown option {name!r}{suggest(name, [*fields, 'scheduler'])}")
        try:
            options[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            expected = "true or false" if kind is bool else "a whole number"
            raise ConfigError(f"{word}: expected {expected}") from error
    return options


def _read(source: Path, checkpoint: str, options: dict[str, Any]) -> tuple[Denoiser, Any]:
    """A denoiser, and what gives a run's own validation images."""
    from quintic.cli.wiring import load_run_model
    from quintic.diffusion import NetworkDenoiser, load_denoiser
    from quintic.diffusion.task import unet_arguments

    if not _is_run(source):
        return load_denoiser(source, **options), None
    if options:
        raise ConfigError(f"a run takes no options, found {', '.join(options)}")
    loaded = load_run_model(source, checkpoint, "cpu", "float32")
    if (task := loaded.header["task"]) != "ddpm":
        raise ConfigError(f"{source} is a run of task {task}; a codec needs a diffusion model, --task ddpm")
    settings = loaded.settings["ddpm"]
    arguments = unet_arguments(settings)

    def own() -> NDArray[np.float32]:
        from quintic.data.images import as_signed, prepare_images

        paths = [Path(path) for path in loaded.header["paths"]] or None
        split = prepare_images(paths, loaded.settings["data"]).validation
        if not len(split):
            raise DataError(
                f"{source} has no validation images; name pictures that it was not trained on behind the run, or train "
                "with data.validation_fraction=0.1"
            )
        return as_signed(split.images)

    return NetworkDenoiser(loaded.model, settings.target, arguments), own  # type: ignore[arg-type]


def _pictures(paths: list[Path], denoiser: Denoiser, source: Path) -> NDArray[np.float32]:
    """Pictures as the model takes them, whatever their own size and colours."""
    from quintic.data.images import ImageConfig, as_signed, prepare_images

    if not paths:
        raise ConfigError(
            f"{source} comes without pictures; name some that it was not trained on, a folder for example"
        )
    c, h, w = denoiser.shape
    size = h if h == w else 0
    config = ImageConfig(size=size, channels="grey" if c == 1 else "rgb", test_fraction=0.0, validation_fraction=0.0)
    return as_signed(prepare_images(paths, config).train.images)
