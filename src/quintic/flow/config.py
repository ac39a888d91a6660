"""Settings of a TARFLOW, and what arguments it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quintic.core import ConfigError, suggest
from quintic.core.settings import check_counts, check_least, check_names, check_types

__all__ = ["TarFlowConfig", "check_arguments"]

NOISES = ("gaussian", "uniform")
PREPROCESSINGS = ("scale", "logit")
DIRECTIONS = ("density", "sampling")


@dataclass(frozen=True)
class TarFlowConfig:
    """A :class:`quintic.flow.TarFlow` and what it learns.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    channels: int = 0
    """Of the images; 0 follows the data."""
    height: int = 0
    """Of the images; 0 follows the data."""
    image_width: int = 0
    """Of the images; 0 follows the data."""
    classes: int = 0
    """Classes to condition on; -1 follows the data, 0 is without."""
    class_dropout: float = 0.1
    """Share of training images whose class is withheld, so that the model also works without one."""
    patch: int = 4
    """Height and width of a token in pixels."""
    width: int = 64
    """Channels of the transformers."""
    blocks: int = 4
    """Flow blocks; the order of tokens is reversed in every second one."""
    layers: int = 2
    """Attention layers of a block."""
    head_width: int = 32
    """Channels of an attention head."""
    noise: str = "gaussian"
    """gaussian: of size sigma, for images to look at; uniform: within a level, for an honest likelihood."""
    sigma: float = 0.1
    """Standard deviation of gaussian noise, on pixels from -1 to 1."""
    preprocess: str = "scale"
    """Before the flow: scale (to [-1, 1]) or logit (of a pixel; with uniform noise only)."""
    spline_bins: int = 0
    """Of a learned monotone map of every number before the blocks, and another one behind them; 0 is without. For the
    likelihood: noise within a level, which is not normal, becomes so."""
    inner_width: int = 0
    """Of a small layer in every block by which each number of a token is predicted from those before it, not from
    earlier tokens alone; 0 is without. For the likelihood: sampling takes several times as long."""
    volume_preserving: bool = False
    """Whether blocks only shift, so that no volume changes; then learn the prior's variance."""
    learned_prior: bool = False
    """Whether the variance of every latent is learned, in place of 1."""
    direction: str = "density"
    """Which way is one parallel pass: density (training fast, sampling slow) or sampling (the reverse; it wants a
    lower optim.lr, about 0.003)."""
    checkpoint: bool = False
    """Whether training keeps the inputs of blocks alone and computes the rest again."""
    sample_images: int = 36
    """Images in a sample."""
    guidance: float = 0.0
    """Strength with which samples during training follow their class."""

    def __post_init__(self) -> None:
        check_types("tarflow", self)
        check_names("tarflow", self, {"noise": NOISES, "preprocess": PREPROCESSINGS, "direction": DIRECTIONS})
        check_least("tarflow", self, {
            "channels": 0, "height": 0, "image_width": 0, "classes": -1, "patch": 1, "width": 1, "blocks": 1,
            "layers": 1, "head_width": 1, "spline_bins": 0, "inner_width": 0, "sample_images": 1,
        })  # fmt: skip
        if not 0.0 <= self.class_dropout < 1.0:
            raise ConfigError(f"tarflow.class_dropout must be in [0, 1), found {self.class_dropout}")
        if not 0.0 < self.sigma < 10.0:
            raise ConfigError(f"tarflow.sigma must be in (0, 10), found {self.sigma}")
        if not 0.0 <= self.guidance < 100.0:
            raise ConfigError(f"tarflow.guidance must be in [0, 100), found {self.guidance}")
        if self.guidance and not self.classes:
            raise ConfigError("tarflow.guidance follows the class: set tarflow.classes=-1 to learn the data's classes")
        if self.guidance and not self.class_dropout:
            raise ConfigError(
                "tarflow.guidance needs images that are learned without their class: set tarflow.class_dropout above 0"
            )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a flow, by name, that no flow can have.

    Raises:
        ConfigError: An unknown name, a number out of range, or two that do not fit each other.
    """
    for name, known in (("noise", NOISES), ("preprocess", PREPROCESSINGS), ("direction", DIRECTIONS)):
        if (value := arguments[name]) not in known:
            raise ConfigError(f"unknown {name} {value!r}{suggest(value, known)}")
    check_counts(**{name: arguments[name] for name in ("width", "blocks", "layers", "head_width")})
    check_counts(0, **{name: arguments[name] for name in ("num_classes", "spline_bins", "inner_width")})
    check_counts(2, levels=arguments["levels"])
    if not 0.0 <= (sigma := arguments["sigma"]) < math.inf:
        raise ConfigError(f"sigma = {sigma!r}; expected the size of a noise, 0 or more")
    if arguments["width"] % arguments["head_width"]:
        width, head_width = arguments["width"], arguments["head_width"]
        raise ConfigError(f"width = {width} does not divide into heads of head_width = {head_width}")
    if arguments["preprocess"] == "logit" and arguments["noise"] != "uniform":
        raise ConfigError("preprocess = 'logit' needs noise = 'uniform': gaussian noise leaves the range of pixels")
