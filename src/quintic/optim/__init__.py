"""Optimizers for people who care what a matrix is: Muon with its own routing, clipping, learning rates."""

from quintic.optim.clip import ClipResult, clip_grad_norm_, global_norm
from quintic.optim.config import OptimConfig, build_optimizer
from quintic.optim.lr import convert_lr, lr_factor, scale_factor
from quintic.optim.muon import Muon
from quintic.optim.routing import RoleRow, RoleTable, roles

__all__ = [
    "ClipResult",
    "Muon",
    "OptimConfig",
    "RoleRow",
    "RoleTable",
    "build_optimizer",
    "clip_grad_norm_",
    "convert_lr",
    "global_norm",
    "lr_factor",
    "roles",
    "scale_factor",
]
