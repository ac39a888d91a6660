"""A network as a denoiser: what it predicts, how that becomes x_0, and its file.

With x = alpha x_0 + sigma eps a network may learn any of three targets, which a rotation of (x, target) links:

* ``eps``: x_0 = (x - sigma eps) / alpha, poor where alpha is small;
* ``x0``: itself, poor where sigma is small;
* ``v`` = alpha eps - sigma x_0 (Salimans and Ho 2022): x_0 = alpha x - sigma v, good at every level.

A squared error in v is one in x_0 divided by sigma^2; where there is little noise that is the weight which counts bits,
since the information gained per unit of log_snr is exp(log_snr) / 2 times the error in x_0 (Guo et al. 2005).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.core.files import atomic_write
from quintic.diffusion.denoiser import check_noisy, tensors_fingerprint
from quintic.diffusion.guidance import check_labels
from quintic.diffusion.information import ErrorCurve
from quintic.diffusion.noise_schedule import alpha_sigma
from quintic.diffusion.residuals import Residuals
from quintic.diffusion.unet import UNet

__all__ = ["TARGETS", "NetworkDenoiser", "make_target", "x0_from_target"]

TARGETS = ("v", "eps", "x0")


def make_target(target: str, x0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """What a network should say.

    Args:
        target: v, eps or x0.
        x0: (b, c, h, w).
        eps: Its noise.
        log_snr: (b,).
    """
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    alpha, sigma = alpha_sigma(log_snr, x0)
    return alpha * eps - sigma * x0


def x0_from_target(target: str, x: Tensor, predicted: Tensor, log_snr: Tensor) -> Tensor:
    """The clean image that a network's prediction means; the inverse of :func:`make_target`."""
    if target == "x0":
        return predicted
    alpha, sigma = alpha_sigma(log_snr, x)
    if target == "eps":
        return (x - sigma * predicted) / alpha
    return alpha * x - sigma * predicted


class NetworkDenoiser:
    """A U-Net seen through the protocol :class:`quintic.diffusion.Denoiser`.

    Args:
        network: In evaluation mode, unless dropout is wanted.
        target: What it was trained to predict.
        arguments: Those of :class:`UNet` that rebuild it, for :meth:`save`.
        curve: Its errors on validation images, if they were measured; kept in the file.

    Raises:
        ConfigError: Unknown target.
    """

    def __init__(self, network: UNet, target: str, arguments: dict[str, Any], curve: ErrorCurve | None = None) -> None:
        if target not in TARGETS:
            raise ConfigError(f"unknown target {target!r}{suggest(target, TARGETS)}")
        self.network = network
        self.target = target
        self.curve = curve
        self._fingerprint: str | None = None
        self._config = json.dumps({"target": target, **arguments}, sort_keys=True)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.network.parameters())
        return f"NetworkDenoiser(shape={self.shape}, target={self.target!r}, {count:,} parameters)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.network.shape

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights, target and sizes, as they are when it is first asked for."""
        if self._fingerprint is None:
            self._fingerprint = tensors_fingerprint(dict(self.network.state_dict()), self._config)
        return self._fingerprint

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0 without."""
        return self.network.num_classes

    @torch.no_grad()
    def predict_x0(self, x: Tensor, log_snr: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The expected clean image; see :class:`quintic.diffusion.Denoiser`.

        Args:
            x: (b, c, h, w).
            log_snr: One, or (b,).
            labels: (b,) classes, of a model with classes; -1 and None are "no class".

        Raises:
            ConfigError: Another shape, or labels that are out of range or not wanted.
        """
        check_noisy(x, self.shape)
        level = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu").expand(len(x))
        weight = self.network.enter.weight  # images go to where the network is, and come back
        if labels is not None and self.num_classes:  # else the network refuses them
            check_labels(labels, self.num_classes, least=-1)
            labels = torch.where(labels < 0, self.num_classes, labels).to(weight.device)
        there = {"device": weight.device, "dtype": weight.dtype}
        said = self.network(x.to(**there), level.to(**there), labels)
        return x0_from_target(self.target, x, said.to(x), level)

    def save(self, path: Path, **metadata: str) -> None:
        """Write weights in half precision and sizes as one safetensors file.

        The fingerprint of what is loaded from it differs from this one's, since the weights are rounded.
        """
        halves = {name: tensor.half().contiguous() for name, tensor in self.network.state_dict().items()}
        if self.curve is not None:
            kept: dict[str, Any] = {"levels": self.curve.levels, "errors": self.curve.errors}
            if self.curve.residuals is not None:
                kept["residuals"] = asdict(self.curve.residuals)
            metadata["curve"] = json.dumps(kept)
        atomic_write(path, save(halves, metadata={"kind": "unet", "config": self._config, **metadata}))

    @classmethod
    def load(cls, path: Path) -> NetworkDenoiser:
        """Read what :meth:`save` wrote, as float32.

        Raises:
            CheckpointError: The file is missing or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            arguments = json.loads(metadata["config"])
            target = arguments.pop("target")
            arguments["shape"] = tuple(arguments["shape"])
            curve = None
            if "curve" in metadata:
                kept = json.loads(metadata["curve"])
                tables = kept.get("residuals")  # files of before have none
                residuals = tables and Residuals(*(tuple(map(tuple, tables[part])) for part in ("sizes", "bands")))
                values = math.prod(arguments["shape"])
                curve = ErrorCurve(tuple(kept["levels"]), tuple(kept["errors"]), values, residuals)
            network = UNet(**arguments, initialize=False)
            network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
            return cls(network.eval().requires_grad_(False), target, arguments, curve)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a file of a U-Net denoiser: {error}") from error
