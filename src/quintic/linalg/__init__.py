"""Functions of a matrix or a batch of matrices: the matrix sign, its polynomials, and the spectral norm."""

from quintic.linalg.coefficients import polar_express_coefficients, resolve_schedule
from quintic.linalg.polar import choose_method, msign
from quintic.linalg.spectral import (
    TopSingular,
    conv_spectral_norm,
    spectral_norm,
    spectral_norm_grad,
    top_singular,
)

__all__ = [
    "TopSingular",
    "choose_method",
    "conv_spectral_norm",
    "msign",
    "polar_express_coefficients",
    "resolve_schedule",
    "spectral_norm",
    "spectral_norm_grad",
    "top_singular",
]
