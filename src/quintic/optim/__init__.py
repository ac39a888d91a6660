"""Optimizers for people who care what a matrix is: Muon with its own routing, clipping, decay, diagnostics."""

from quintic.optim.clip import (
    ClipResult,
    GradientClipping,
    NonFiniteGradientError,
    clip_grad_norm_,
    clip_grad_spectral_,
)
from quintic.optim.clip_advice import ClipStatistics, advice, clip_statistics
from quintic.optim.config import OptimConfig, build_optimizer
from quintic.optim.diagnostics import Diagnosis, diagnose, snapshot
from quintic.optim.groups import param_groups
from quintic.optim.interop import load_foreign_state
from quintic.optim.lr import convert_lr, lr_factor, momentum_at, scale_factor
from quintic.optim.muon import Muon
from quintic.optim.norms import global_norm
from quintic.optim.qk_clip import clip_latent_qk_, clip_qk_, max_logits, split_heads
from quintic.optim.routing import RoleRow, RoleTable, roles

__all__ = [
    "ClipResult",
    "ClipStatistics",
    "Diagnosis",
    "GradientClipping",
    "Muon",
    "NonFiniteGradientError",
    "OptimConfig",
    "RoleRow",
    "RoleTable",
    "advice",
    "build_optimizer",
    "clip_grad_norm_",
    "clip_grad_spectral_",
    "clip_latent_qk_",
    "clip_qk_",
    "clip_statistics",
    "convert_lr",
    "diagnose",
    "global_norm",
    "load_foreign_state",
    "lr_factor",
    "max_logits",
    "momentum_at",
    "param_groups",
    "roles",
    "scale_factor",
    "snapshot",
    "split_heads",
]
