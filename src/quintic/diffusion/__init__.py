"""Diffusion models of images: noise levels, denoisers, samplers, a U-Net and its training."""

from quintic.diffusion.config import DDPMConfig
from quintic.diffusion.denoiser import Denoiser, GaussianDenoiser
from quintic.diffusion.guidance import ClassConditional
from quintic.diffusion.information import ErrorCurve, measure_errors
from quintic.diffusion.loading import load_denoiser, shipped_denoiser, shipped_names
from quintic.diffusion.network import NetworkDenoiser
from quintic.diffusion.noise_schedule import NoiseSchedule, alpha_sigma
from quintic.diffusion.samplers import ancestral_sample, ddim_sample, reverse_step
from quintic.diffusion.unet import UNet

__all__ = [
    "ClassConditional",
    "DDPMConfig",
    "Denoiser",
    "ErrorCurve",
    "GaussianDenoiser",
    "NetworkDenoiser",
    "NoiseSchedule",
    "UNet",
    "alpha_sigma",
    "ancestral_sample",
    "ddim_sample",
    "load_denoiser",
    "measure_errors",
    "reverse_step",
    "shipped_denoiser",
    "shipped_names",
]
