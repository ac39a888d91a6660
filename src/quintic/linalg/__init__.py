"""Functions of a matrix or a batch of matrices: the matrix sign and the polynomials that compute it."""

from quintic.linalg.coefficients import polar_express_coefficients, resolve_schedule
from quintic.linalg.polar import choose_method, msign

__all__ = ["choose_method", "msign", "polar_express_coefficients", "resolve_schedule"]
