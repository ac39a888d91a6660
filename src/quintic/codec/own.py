"""A model of one's own in one file: the network and what the codec has to know of it.

A U-Net of this package is written as :meth:`quintic.diffusion.NetworkDenoiser.save` writes it, with the errors that
were measured. Of a foreign network, a folder of diffusers or a state dict of OpenAI's repositories, the file holds the
files themselves byte for byte, the options they are read with, and the curve: what reads them reads them as before.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from quintic.codec.curve import Curve
from quintic.codec.models import calibrate, measure_curve
from quintic.core import CheckpointError, ConfigError
from quintic.core.files import atomic_write
from quintic.diffusion import GaussianDenoiser, NetworkDenoiser, load_denoiser
from quintic.diffusion.denoiser import Denoiser, tensors_fingerprint
from quintic.diffusion.residuals import Residuals

__all__ = ["load_model", "save_foreign", "save_model"]

_FOREIGN = "foreign"
_PARTS = (".json", ".safetensors")
"""Endings of what a folder of diffusers is read from."""


def save_model(denoiser: Denoiser, images: NDArray[np.float32], path: Path, *, seed: int = 0, batch: int = 64) -> None:
    """Measure a U-Net of this package on images, and write both.

    Args:
        denoiser: A :class:`quintic.diffusion.NetworkDenoiser`; its weights are rounded to half precision, as in the
            file, before they are measured.
        images: (n, c, h, w) in [-1, 1] that it was not trained on; some hundreds.
        path: A ``.safetensors``.
        seed: Of the noise.
        batch: Images per call.

    Raises:
        ConfigError: A denoiser of another kind.
        DataError: No images, or of another shape.
    """
    if isinstance(denoiser, GaussianDenoiser):
        raise ConfigError("a Gaussian denoiser knows its errors itself; its own save writes all that a codec needs")
    if not isinstance(denoiser, NetworkDenoiser):
        raise ConfigError(
            f"expected a U-Net of this package, found {denoiser!r}; of foreign models save_foreign keeps the files"
        )
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "rounded.safetensors"
        denoiser.save(beside)
        rounded = NetworkDenoiser.load(beside)
    rounded.network.to(denoiser.network.enter.weight.device)
    rounded.curve = measure_curve(rounded, images, seed=seed, batch=batch)
    rounded.save(path)


def save_foreign(
    source: Path, images: NDArray[np.float32], path: Path, *, seed: int = 0, batch: int = 64, **options: Any
) -> None:
    """Measure a foreign network on images, and write its files and what was measured as one.

    Args:
        source: A folder of diffusers or a ``.pt`` state dict; see :func:`quintic.diffusion.load_denoiser`.
        images: As for :func:`save_model`.
        path: A ``.safetensors``.
        seed: Of the noise.
        batch: Images per call.
        **options: Of ``load_denoiser`` for this kind of file.

    Raises:
        CheckpointError: Not such a file or folder.
        DataError: No images, or of another shape.
    """
    curve = calibrate(load_denoiser(source, **options), images, seed=seed, batch=batch)
    inside = [source] if source.is_file() else [p for p in sorted(source.rglob("*")) if p.suffix in _PARTS]
    named = {p.name if p == source else p.relative_to(source).as_posix(): p for p in inside}
    if scheduler := options.pop("scheduler", None):
        home = "scheduler/" if (source / "model_index.json").is_file() else ""
        named[f"{home}scheduler_config.json"] = Path(scheduler) / "scheduler_config.json"
    kept = {name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for name, p in named.items()}
    assert curve.residuals is not None
    known = {"knots": curve.knots, "residuals": asdict(curve.residuals)}
    told = {"kind": _FOREIGN, "curve": json.dumps(known), "options": json.dumps(options)}
    if source.is_file():
        told["file"] = source.name
    atomic_write(path, save(kept, metadata=told))


def load_model(path: Path) -> tuple[Denoiser, Curve | None]:
    """A denoiser from a file, and its curve unless it knows it itself.

    Args:
        path: What :func:`save_model` or :func:`save_foreign` wrote, or anything that ``load_denoiser`` reads.

    Raises:
        CheckpointError: Missing, damaged, or none of these.
    """
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
        except (OSError, SafetensorError):
            told = {}  # load_denoiser says what is wrong
        if told.get("kind") == _FOREIGN:
            try:
                return _foreign(path, told)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
    return load_denoiser(path), None


class _Foreign:
    """A foreign denoiser, named by its files and options: what its reader calls it may depend on where they lie."""

    def __init__(self, denoiser: Denoiser, fingerprint: str) -> None:
        self._denoiser = denoiser
        self.shape = denoiser.shape
        self.fingerprint = fingerprint

    def predict_x0(self, x: Tensor, log_snr: float | Tensor) -> Tensor:
        """See :class:`quintic.diffusion.Denoiser`."""
        return self._denoiser.predict_x0(x, log_snr)


def _foreign(path: Path, told: dict[str, str]) -> tuple[Denoiser, Curve]:
    known = json.loads(told["curve"])
    residuals = Residuals(*(tuple(map(tuple, known["residuals"][part])) for part in ("sizes", "bands")))
    curve = Curve(tuple(known["knots"]), residuals)
    kept = load_file(path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, data in kept.items():
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or "\\" in name or ":" in name:
                raise CheckpointError(f"{path} is damaged: it names a file {name!r}")
            (target := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.numpy().tobytes())
        read = load_denoiser(Path(folder, told.get("file", "")), **json.loads(told["options"]))
    return _Foreign(read, tensors_fingerprint(kept, told["options"])), curve
