"""Quintic: matrix optimizers, mixtures of experts, flows, diffusion codes and matrix skeletons.

The rooms are subpackages (``quintic.optim``, ``quintic.moe``, ``quintic.lm`` ...); the names people reach for first are
here too and are imported when they are first used, so that ``import quintic`` does not import torch.

Example:
    >>> import quintic
    >>> quintic.Muon.__module__
    'quintic.optim.muon'
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quintic.codec import Codec as Codec
    from quintic.core import UserError as UserError
    from quintic.core import declare as declare
    from quintic.diffusion import GaussianDenoiser as GaussianDenoiser
    from quintic.diffusion import NoiseSchedule as NoiseSchedule
    from quintic.diffusion import UNet as UNet
    from quintic.diffusion import ancestral_sample as ancestral_sample
    from quintic.diffusion import load_denoiser as load_denoiser
    from quintic.diffusion import shipped_denoiser as shipped_denoiser
    from quintic.flow import TarFlow as TarFlow
    from quintic.linalg import msign as msign
    from quintic.linalg import polar_express_coefficients as polar_express_coefficients
    from quintic.linalg import spectral_norm as spectral_norm
    from quintic.linalg import spectral_norm_grad as spectral_norm_grad
    from quintic.lm import LanguageModel as LanguageModel
    from quintic.lm import LMConfig as LMConfig
    from quintic.lm import generate as generate
    from quintic.lm import load_deepseek as load_deepseek
    from quintic.lm import save_deepseek as save_deepseek
    from quintic.lowrank import cr as cr
    from quintic.lowrank import cur as cur
    from quintic.lowrank import interpolative as interpolative
    from quintic.lowrank import nystrom as nystrom
    from quintic.lowrank import svd as svd
    from quintic.moe import AuxLoss as AuxLoss
    from quintic.moe import LossFree as LossFree
    from quintic.moe import MoE as MoE
    from quintic.moe import NoBalance as NoBalance
    from quintic.moe import aux_loss as aux_loss
    from quintic.moe import balance_step as balance_step
    from quintic.moe import balanced_assign as balanced_assign
    from quintic.moe import split_dense as split_dense
    from quintic.optim import Muon as Muon
    from quintic.optim import clip_grad_norm_ as clip_grad_norm_
    from quintic.optim import convert_lr as convert_lr
    from quintic.optim import roles as roles
    from quintic.runs import load_run as load_run

_HOMES = {
    "AuxLoss": "moe",
    "Codec": "codec",
    "GaussianDenoiser": "diffusion",
    "LMConfig": "lm",
    "LanguageModel": "lm",
    "LossFree": "moe",
    "MoE": "moe",
    "Muon": "optim",
    "NoBalance": "moe",
    "NoiseSchedule": "diffusion",
    "TarFlow": "flow",
    "UNet": "diffusion",
    "UserError": "core",
    "ancestral_sample": "diffusion",
    "aux_loss": "moe",
    "balance_step": "moe",
    "balanced_assign": "moe",
    "clip_grad_norm_": "optim",
    "convert_lr": "optim",
    "cr": "lowrank",
    "cur": "lowrank",
    "declare": "core",
    "generate": "lm",
    "interpolative": "lowrank",
    "load_deepseek": "lm",
    "load_denoiser": "diffusion",
    "load_run": "runs",
    "msign": "linalg",
    "nystrom": "lowrank",
    "polar_express_coefficients": "linalg",
    "roles": "optim",
    "save_deepseek": "lm",
    "shipped_denoiser": "diffusion",
    "spectral_norm": "linalg",
    "spectral_norm_grad": "linalg",
    "split_dense": "moe",
    "svd": "lowrank",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

try:
    __version__ = version("quintic")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quintic' has no attribute {name!r}")
    return getattr(import_module(f"quintic.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
