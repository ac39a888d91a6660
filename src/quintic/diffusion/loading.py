"""One function that reads any denoiser from a file or folder, and the models that come with the package.

Known: this package's own safetensors, folders of diffusers (``DDPMPipeline``, or ``UNet2DModel`` with its scheduler)
and state dicts of OpenAI's two repositories. Weights are read as safetensors or without running pickled code.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quintic.assets import weights_names, weights_path
from quintic.core import CheckpointError, ConfigError, MissingExtraError
from quintic.diffusion.denoiser import Denoiser, GaussianDenoiser, tensors_fingerprint
from quintic.diffusion.network import NetworkDenoiser
from quintic.diffusion.openai import load_openai
from quintic.diffusion.stepwise import StepwiseDenoiser

__all__ = ["load_denoiser", "load_diffusers", "shipped_denoiser", "shipped_names"]

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def load_denoiser(path: Path | str, **options: Any) -> Denoiser:
    """Read a denoiser.

    Args:
        path: A ``.safetensors`` of this package, a folder of diffusers, or a ``.pt`` state dict of
            openai/improved-diffusion or openai/guided-diffusion.
        **options: Of a folder of diffusers ``scheduler`` (:func:`load_diffusers`); of a state dict the flags of its
            README (:class:`quintic.diffusion.openai.OpenAIFlags`); otherwise none.

    Raises:
        CheckpointError: Missing, damaged, or none of these.
        ConfigError: An option that does not belong to this kind of file.
        MissingExtraError: A folder of diffusers, without diffusers installed.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such file or folder: {path}")
    if path.is_dir():
        return load_diffusers(path, **options)
    if path.suffix in (".pt", ".pth"):
        return load_openai(path, **options)
    if options:
        raise ConfigError(f"{path} takes no options, found {', '.join(options)}")
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); expected one written by this package, a folder of diffusers "
            "or a .pt state dict"
        ) from error
    if kind == "gaussian":
        return GaussianDenoiser.load(path)
    if kind == "unet":
        return NetworkDenoiser.load(path)
    raise CheckpointError(f"{path} holds weights of an unknown kind ({kind}); if of diffusers, give its folder")


def shipped_names() -> list[str]:
    """Names of the models that come with the package."""
    return weights_names("ddpm")


def shipped_denoiser(name: str) -> Denoiser:
    """A model that comes with the package; its card says on what it was trained.

    Raises:
        ConfigError: No model has that name.
    """
    return load_denoiser(weights_path("ddpm", name))


def load_diffusers(path: Path, *, scheduler: Path | str | None = None) -> StepwiseDenoiser:
    """Read a folder written by ``save_pretrained`` of diffusers.

    Args:
        path: Of a ``DDPMPipeline`` (or another pipeline with ``unet`` and ``scheduler``), or of a ``UNet2DModel``.
        scheduler: Folder of the scheduler, for a model that has none beside it.

    Raises:
        CheckpointError: The folder is no such model, is damaged, or has no scheduler.
        MissingExtraError: diffusers is not installed.
    """
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingExtraError("diffusers", "interop") from error
    is_pipeline = (path / "model_index.json").is_file()
    model_folder = path / "unet" if is_pipeline else path
    if scheduler is not None:
        scheduler_folder = Path(scheduler)
    else:
        scheduler_folder = path / "scheduler" if is_pipeline else path
    kind = _json(model_folder / "config.json").get("_class_name")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{model_folder} holds a {kind}; only UNet2DModel is a denoiser of plain images")
    if not (scheduler_folder / "scheduler_config.json").is_file():
        raise CheckpointError(
            f"{scheduler_folder} has no scheduler_config.json, so the noise of each step is not known; name a folder "
            "that has one: load_denoiser(path, scheduler=folder)"
        )
    try:
        network: Any = diffusers.UNet2DModel.from_pretrained(model_folder, local_files_only=True, use_safetensors=True)
        steps: Any = diffusers.DDPMScheduler.from_pretrained(scheduler_folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"diffusers cannot read {path}: {error}") from error
    prediction = steps.config.prediction_type
    if prediction not in _PREDICTIONS:
        raise CheckpointError(f"{scheduler_folder} has the unknown prediction_type {prediction!r}")
    size = network.config.sample_size
    if size is None:
        raise CheckpointError(f"{model_folder}/config.json has no sample_size, so the size of images is not known")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    network = network.eval().requires_grad_(False)
    settings = json.dumps([dict(network.config), dict(steps.config)], sort_keys=True, default=str)

    def predict(x: Tensor, step: Tensor, labels: Tensor | None) -> Tensor:
        return network(x, step, class_labels=labels).sample

    return StepwiseDenoiser(
        predict,
        steps.alphas_cumprod.double().numpy().astype(np.float64),
        _PREDICTIONS[prediction],
        (network.config.in_channels, height, width),
        tensors_fingerprint(dict(network.state_dict()), settings),
        network.config.num_class_embeds or 0,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a folder of diffusers") from error
    return found if isinstance(found, dict) else {}
