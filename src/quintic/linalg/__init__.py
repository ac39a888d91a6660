"""Functions of a matrix or a batch of matrices: the matrix sign, its polynomials and kin, and the spectral norm."""

from quintic.linalg.coefficients import fitted_coefficients, polar_express_coefficients, resolve_schedule
from quintic.linalg.polar import choose_method, msign
from quintic.linalg.schatten import schatten_direction
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
    "fitted_coefficients",
    "msign",
    "polar_express_coefficients",
    "resolve_schedule",
    "schatten_direction",
    "spectral_norm",
    "spectral_norm_grad",
    "top_singular",
]
