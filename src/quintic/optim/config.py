"""Settings of the optimizer, its learning-rate schedule and clipping, and the optimizer built from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from quintic.core import ConfigError
from quintic.core.settings import check_least, check_names, check_types
from quintic.linalg import resolve_schedule
from quintic.linalg.schatten import schatten_exponent
from quintic.optim.clip import CLIPPING, GradientClipping
from quintic.optim.decay import DECAYS
from quintic.optim.lr import SCALES
from quintic.optim.momentum import MOMENTUM_FORMS
from quintic.optim.muon import Muon
from quintic.optim.routing import EMBEDDINGS, VECTORS
from quintic.optim.sharded import DISTRIBUTED

__all__ = ["OptimConfig", "build_optimizer"]

_CHOICES = {
    "name": ("muon", "adamw"),
    "scale": SCALES,
    "clip": CLIPPING,
    "decay": DECAYS,
    "vectors": VECTORS,
    "embeddings": EMBEDDINGS,
    "ns_dtype": ("auto", "float32", "bfloat16"),
    "distributed": DISTRIBUTED,
    "momentum_form": MOMENTUM_FORMS,
    "schedule": ("wsd", "cosine", "constant"),
    "decay_shape": ("1-sqrt", "linear"),
}


@dataclass(frozen=True)
class OptimConfig:
    """How a run is optimized. Every wrong value is a ``ConfigError`` that names ``optim.<field>``."""

    name: str = "muon"
    """muon (matrices by Muon, the rest by AdamW) or adamw (everything by AdamW)."""
    lr: float = 0.01
    """Peak learning rate, of Muon and AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay: weights shrink by lr * weight_decay per step."""
    adamw_lr: float = -1.0
    """Peak learning rate of AdamW's half under muon, for scales that are not Adam's (keller, mup, none); -1 is lr."""
    adamw_weight_decay: float = -1.0
    """Weight decay of AdamW's half under muon; -1 is weight_decay."""
    decay: str = "frobenius"
    """What the decay of matrices under Muon shrinks: frobenius (every singular value) or spectral (the largest)."""
    decay_rank: int = 1
    """How many of the largest singular values spectral decay shrinks."""
    momentum: float = 0.95
    """Muon's momentum, in [0, 1)."""
    momentum_form: str = "average"
    """Muon's momentum is an average of gradients or their sum; the steps differ only while momentum changes."""
    momentum_start: float = 0.85
    """Muon's momentum at the first step, if momentum_warmup_fraction is not 0."""
    momentum_warmup_fraction: float = 0.0
    """Fraction of the steps over which Muon's momentum rises linearly."""
    nesterov: bool = True
    """Whether Muon looks one step ahead along the momentum."""
    scale: str = "moonlight"
    """Muon's factor for a matrix shape: moonlight, rms, keller, mup or none."""
    norm: str = "schatten:inf"
    """Trust region of matrices under Muon: schatten:p, p from 1 to inf (the matrix sign). With others, scale rms."""
    vectors: str = "adamw"
    """What updates gains and biases under muon: adamw, sign or l2."""
    embeddings: str = "adamw"
    """What updates embeddings and the head under muon: adamw or row-l2."""
    cap: float = 0.0
    """A step is scaled down to a predicted loss change of lr * cap, in place of a warm-up; 0 is no cap."""
    coefficients: str = "quintic"
    """Polynomials of the matrix sign: quintic, keller, su, polar-express, taylor or exact."""
    ns_dtype: str = "auto"
    """Dtype of the matrix sign's products: auto (float32 on CPUs, bfloat16 on GPUs fast at it), float32 or bfloat16."""
    distributed: str = "owner"
    """How msign of matrices divided among ranks is taken: owner (each by one rank) or gather (by all)."""
    adamw_beta1: float = 0.9
    """AdamW's decay of the first moment, in [0, 1)."""
    adamw_beta2: float = 0.95
    """AdamW's decay of the second moment, in [0, 1)."""
    adamw_eps: float = 1e-8
    """AdamW's guard against division by zero."""
    clip: str = "global"
    """What clipping looks at: global (the norm of all gradients), spectral (each matrix), adaptive or none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; of adaptive clipping the cap."""
    clip_quantile: float = 0.9
    """Adaptive clipping scales down to this quantile of recent norms."""
    clip_window: int = 100
    """How many norms adaptive clipping remembers."""
    schedule: str = "wsd"
    """Learning rate over time: wsd (warm-up, stable, decay), cosine or constant (after the warm-up)."""
    warmup_fraction: float = 0.05
    """Fraction of the steps over which the rate rises linearly."""
    decay_fraction: float = 0.4
    """Fraction of the steps over which wsd lowers the rate at the end."""
    decay_shape: str = "1-sqrt"
    """Form of wsd's decay: 1-sqrt or linear."""
    final_lr_fraction: float = 0.0
    """Fraction of the peak rate approached at the end of wsd and cosine."""

    def __post_init__(self) -> None:
        check_types("optim", self)
        check_names("optim", self, _CHOICES)
        check_least("optim", self, {"lr": 0, "weight_decay": 0, "adamw_eps": 0, "cap": 0, "decay_rank": 1})
        self._require("lr", self.lr > 0.0, "a positive number: at 0 nothing is learned")
        for name in ("momentum", "momentum_start", "adamw_beta1", "adamw_beta2"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "a number in [0, 1)")
        for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction", "momentum_warmup_fraction"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "a number in [0, 1]")
        for name, shared in (("adamw_lr", "lr"), ("adamw_weight_decay", "weight_decay")):
            value = getattr(self, name)
            self._require(name, value == -1.0 or 0.0 <= value < math.inf, f"0 or more, or -1 for optim.{shared}")
        self._require("clip_norm", self.clip_norm > 0.0, "a positive number, or inf for no clipping")
        if self.schedule == "wsd":
            together = self.warmup_fraction + self.decay_fraction
            self._require(
                "decay_fraction", together <= 1.0, f"at most {1 - self.warmup_fraction:g}, what warm-up leaves"
            )
        checks = {
            "coefficients": lambda: resolve_schedule(self.coefficients),
            "norm": lambda: schatten_exponent(self.norm),
            "clip_...": self.make_clipping,
        }
        for name, check in checks.items():
            try:
                check()
            except ConfigError as error:
                raise ConfigError(f"optim.{name}: {error}") from None

    def make_clipping(self) -> GradientClipping:
        """The clipping that the fields describe."""
        return GradientClipping(self.clip, self.clip_norm, quantile=self.clip_quantile, window=self.clip_window)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"optim.{name} = {getattr(self, name)!r}; expected {expected}")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Muon:
    """One optimizer for all parameters of a model, at the peak of its rates.

    Each group's peak stays in its ``initial_lr``, as torch's schedulers keep it: per step, ``lr`` is this times
    :func:`quintic.optim.lr_factor`. Where the momentum has a warm-up, set it from
    :func:`quintic.optim.lr.momentum_at` likewise.

    ``adamw`` is the same class with every parameter in its AdamW half, so that runs differ in the rule alone.
    """
    muon = config.name == "muon"
    params = model if muon else [{"params": list(model.named_parameters()), "algorithm": "adamw"}]
    optimizer = Muon(
        params,
        lr=config.lr,
        weight_decay=config.weight_decay,
        decay=config.decay,
        decay_rank=config.decay_rank,
        momentum=config.momentum,
        momentum_form=config.momentum_form,
        nesterov=config.nesterov,
        scale=config.scale,
        norm=config.norm,
        cap=config.cap or None,
        vectors=config.vectors,
        embeddings=config.embeddings,
        coefficients=config.coefficients,
        ns_dtype=None if config.ns_dtype == "auto" else getattr(torch, config.ns_dtype),
        distributed=config.distributed,
        adamw_lr=config.adamw_lr if muon and config.adamw_lr >= 0.0 else None,
        adamw_weight_decay=config.adamw_weight_decay if muon and config.adamw_weight_decay >= 0.0 else None,
        adamw_betas=(config.adamw_beta1, config.adamw_beta2),
        adamw_eps=config.adamw_eps,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
