"""Mixture of experts: router, experts, loss-free balance, statistics."""

from quintic.moe.balance import LossFree, NoBalance
from quintic.moe.layer import MoE, balance_step
from quintic.moe.router import routed_scaling_factor
from quintic.moe.stats import ExpertStats, max_violation, sampling_floor

__all__ = [
    "ExpertStats",
    "LossFree",
    "MoE",
    "NoBalance",
    "balance_step",
    "max_violation",
    "routed_scaling_factor",
    "sampling_floor",
]
