"""Mixture of experts: geometry, router, experts, balance by loss or by bias, statistics."""

from quintic.moe.assignment import balanced_assign
from quintic.moe.auxiliary import AuxLoss, ZLoss
from quintic.moe.balance import Combination, LossFree, NoBalance
from quintic.moe.layer import MoE, aux_loss, balance_step
from quintic.moe.router import routed_scaling_factor
from quintic.moe.sequence import MovingQuantile
from quintic.moe.splitting import DenseSplit, split_dense
from quintic.moe.stats import ExpertStats, RouteRecorder, max_violation, sampling_floor, specialisation

__all__ = [
    "AuxLoss",
    "Combination",
    "DenseSplit",
    "ExpertStats",
    "LossFree",
    "MoE",
    "MovingQuantile",
    "NoBalance",
    "RouteRecorder",
    "ZLoss",
    "aux_loss",
    "balance_step",
    "balanced_assign",
    "max_violation",
    "routed_scaling_factor",
    "sampling_floor",
    "specialisation",
    "split_dense",
]
