"""The spectral norm ||A||_2 = sigma_1, its singular vectors and its gradient u v' (post kexue.fm/archives/10648).

    d ||A||_2 / dA = u_1 v_1'        for sigma_1 > sigma_2, with A v_1 = sigma_1 u_1

Where sigma_1 = sigma_2 no gradient exists; u v' is then a subgradient for any unit v in the top singular space and
u = A v / sigma_1, and so is 0 at A = 0. Three ways to v_1:

* power: v <- A'A v / ||A'A v||, from two Gaussian starts, the better of which counts. The component along v_2 shrinks
  by (sigma_2 / sigma_1)^2 per iteration;
* lanczos: the best v in the Krylov space of A'A and one Gaussian start (Golub-Kahan with full reorthogonalisation).
  At equal products much nearer to sigma_1 than power; for one-off estimates;
* svd: exact, slow.

The first two are lower bounds: the estimate is ||A v|| of a unit v. The starts depend on the seed alone, so a matrix
gets the same answer in any batch. The vector iterated is the one of the shorter side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.linalg.sketch import seeded

__all__ = [
    "NORM_METHODS",
    "TopSingular",
    "check_matrices",
    "conv_spectral_norm",
    "gaussian_start",
    "spectral_norm",
    "spectral_norm_grad",
    "top_singular",
    "wide_and_scaled",
]

NORM_METHODS = ("power", "lanczos", "svd")
"""Names accepted by :func:`spectral_norm`."""

_ITERATIONS = {"power": 30, "lanczos": 16, "svd": 0}  # either is within 1% on a Gaussian 1024 x 1024 matrix
_STARTS = 2


class TopSingular(NamedTuple):
    """The largest singular value and its vectors, in at least float32."""

    sigma: Tensor
    """(...): 0 for a zero matrix, NaN for one with a non-finite element."""
    u: Tensor
    """(..., n), of unit length; zero for a zero matrix."""
    v: Tensor
    """(..., m), of unit length; zero for a zero matrix."""
    residual: Tensor
    """(...): max(||A v - sigma u||, ||A' u - sigma v||) / sigma, how far from converged; 0 for a zero matrix."""


@torch.no_grad()
def top_singular(A: Tensor, *, method: str = "power", iterations: int | None = None, seed: int = 0) -> TopSingular:
    """The top singular triple of the last two axes; leading axes are a batch. Not differentiable.

    Scale-invariant over the whole range of the dtype; half precision is computed in float32.

    Args:
        A: (..., n, m), real, floating; empty axes count as zero.
        method: ``power``, ``lanczos`` or ``svd``.
        iterations: Pairs of products with A and A'; ``None`` is 30 for power and 16 for lanczos. Not used by ``svd``.
        seed: Of the Gaussian starts.

    Raises:
        ConfigError: A is not a floating (..., n, m) tensor, or the method, the iterations or the seed are unusable.
    """
    check_matrices(A)
    if method not in NORM_METHODS:
        raise ConfigError(f"unknown method {method!r}{suggest(str(method), NORM_METHODS)}")
    if iterations is None:
        iterations = _ITERATIONS[method]
    elif isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ConfigError(f"iterations = {iterations!r}; expected a whole number, 1 or more")
    batch, (n, m) = A.shape[:-2], A.shape[-2:]
    X, peak = wide_and_scaled(A)
    if A.numel() == 0:
        zero = X.new_zeros
        return TopSingular(zero(batch), zero((*batch, n)), zero((*batch, m)), zero(batch))
    X, peak = X.reshape(-1, n, m), peak.reshape(-1)
    finite = X.isfinite().all(-1).all(-1)
    X = X.masked_fill(~finite[:, None, None], 0.0)  # LAPACK refuses a whole batch for one non-finite element

    flipped = n < m
    T = X.mT if flipped else X
    if method == "svd":
        w = torch.linalg.svd(T, full_matrices=False).Vh[:, 0]
    elif method == "power":
        w = _power(T, iterations, seed)
    else:
        w = _lanczos(T, iterations, seed)
    image = _apply(T, w)
    sigma = torch.linalg.vector_norm(image, dim=-1)
    w = w * (sigma > 0).to(w.dtype)[:, None]
    image = image / torch.where(sigma > 0, sigma, 1.0)[:, None]
    miss = torch.linalg.vector_norm(_apply(T.mT, image) - sigma[:, None] * w, dim=-1)
    residual = miss / torch.where(sigma > 0, sigma, 1.0)
    u, v = (w, image) if flipped else (image, w)

    def whole(value: Tensor) -> Tensor:
        bad = ~finite if value.ndim == 1 else ~finite[:, None]
        return value.masked_fill(bad, torch.nan).reshape((*batch, *value.shape[1:]))

    return TopSingular(whole(sigma * peak), whole(u), whole(v), whole(residual))


def spectral_norm(A: Tensor, *, method: str = "power", iterations: int | None = None, seed: int = 0) -> Tensor:
    """The largest singular value of every matrix; a lower bound of it with ``power`` and ``lanczos``.

    Args:
        A: (..., n, m), real, floating.
        method: ``power``, ``lanczos`` or ``svd``.
        iterations: See :func:`top_singular`.
        seed: Of the Gaussian starts.

    Returns:
        (...), in at least float32.

    Raises:
        ConfigError: As :func:`top_singular`.

    Example:
        >>> spectral_norm(torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]), method="svd")
        tensor([3., 0.])
    """
    return top_singular(A, method=method, iterations=iterations, seed=seed).sigma


def spectral_norm_grad(A: Tensor, *, method: str = "svd", iterations: int | None = None, seed: int = 0) -> Tensor:
    """d ||A||_2 / dA = u_1 v_1', a subgradient where sigma_1 = sigma_2, and zero for a zero matrix.

    With ``power`` and ``lanczos`` it is as good as the ``residual`` that :func:`top_singular` returns.

    Args:
        A: (..., n, m), real, floating.
        method: ``svd``, ``power`` or ``lanczos``.
        iterations: See :func:`top_singular`.
        seed: Of the Gaussian starts.

    Returns:
        (..., n, m), in at least float32, of rank 1 and norm 1 (or 0).

    Raises:
        ConfigError: As :func:`top_singular`.
    """
    top = top_singular(A, method=method, iterations=iterations, seed=seed)
    return top.u.unsqueeze(-1) * top.v.unsqueeze(-2)


@torch.no_grad()
def conv_spectral_norm(weight: Tensor, *, kind: str = "operator", size: Sequence[int] | None = None) -> Tensor:
    """Spectral norm of a convolution (stride 1, one group), exact.

    Args:
        weight: (out, in, *kernel).
        kind: ``operator``: of the linear map from images to images with circular padding, the largest norm of an
            (out, in) matrix of the kernel's discrete Fourier transform. ``reshaped``: of the (out, in * kernel)
            matrix, Miyato's proxy, which is neither an upper nor a lower bound; sqrt(prod(kernel)) times it is an
            upper bound of the operator norm.
        size: Image size, one number per axis of the kernel and at least as large; for ``operator`` only.

    Returns:
        0-d, in at least float32.

    Raises:
        ConfigError: The weight is not a kernel, the kind is unknown, or the size is missing, superfluous or too small.

    Example:
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> round(conv_spectral_norm(blur, size=(8, 8)).item(), 4)
        1.0
        >>> round(conv_spectral_norm(blur, kind="reshaped").item(), 4)
        0.3333
    """
    check_matrices(weight)
    if weight.ndim < 3:
        raise ConfigError(f"a convolution has a weight (out, in, *kernel), found shape {tuple(weight.shape)}")
    kernel = tuple(weight.shape[2:])
    if kind == "reshaped":
        if size is not None:
            raise ConfigError("size is for kind='operator'; the reshaped matrix does not depend on the image")
        return spectral_norm(weight.flatten(1), method="svd")
    if kind != "operator":
        raise ConfigError(f"unknown kind {kind!r}{suggest(str(kind), ('operator', 'reshaped'))}")
    if size is None or len(size) != len(kernel) or any(s < k for s, k in zip(size, kernel, strict=True)):
        raise ConfigError(f"size = {size}; expected the image size, one number per kernel axis, at least {kernel}")
    X, peak = wide_and_scaled(weight.flatten(1))
    if weight.numel() == 0:
        return X.new_zeros(())
    if not X.isfinite().all():
        return X.new_full((), math.nan)
    # A real kernel has conjugate transforms at opposite frequencies, so that half of them is enough.
    transform = torch.fft.rfftn(X.reshape(weight.shape), s=list(size), dim=list(range(2, weight.ndim)))
    return torch.linalg.svdvals(transform.flatten(2).permute(2, 0, 1)).amax() * peak.reshape(())


def gaussian_start(short: int, count: int, seed: int, like: Tensor) -> Tensor:
    """(short, count) orthonormal columns that span a Gaussian subspace: a pure function of the first three."""
    columns = torch.randn((short, count), generator=seeded(seed), dtype=torch.float64, device="cpu")
    return torch.linalg.qr(columns).Q.to(like)


def wide_and_scaled(A: Tensor) -> tuple[Tensor, Tensor]:
    """A in at least float32, divided by the largest magnitude of each matrix (1 for zeros), and that magnitude."""
    X = A if A.dtype == torch.float64 else A.float()
    if X.numel() == 0:
        return X, X.new_ones((*A.shape[:-2], 1, 1))
    peak = X.abs().amax((-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    return X / peak, peak


def check_matrices(A: Tensor) -> None:
    """Raise ConfigError for what is no floating (..., n, m) tensor."""
    if not isinstance(A, Tensor):
        raise ConfigError(f"expected a tensor (..., n, m), found {type(A).__name__}; convert it with torch.as_tensor")
    if A.ndim < 2 or not A.is_floating_point():
        raise ConfigError(
            f"expected real floating matrices (..., n, m), found shape {tuple(A.shape)} of {A.dtype}; "
            "reshape, or view a complex matrix as a real one"
        )


def _apply(T: Tensor, w: Tensor) -> Tensor:
    return (T @ w.unsqueeze(-1)).squeeze(-1)


def _power(T: Tensor, iterations: int, seed: int) -> Tensor:
    """Unit w (batch, short) with a large ||T w||, for tall T of magnitude 1."""
    batch, _, short = T.shape
    W = gaussian_start(short, min(_STARTS, short), seed, T).expand(batch, -1, -1)
    for _ in range(iterations):
        Z = T.mT @ (T @ W)
        norm = torch.linalg.vector_norm(Z, dim=-2, keepdim=True)
        W = torch.where(norm > 0, Z / norm, W)
    best = torch.linalg.vector_norm(T @ W, dim=-2).argmax(-1)
    return W.gather(-1, best[:, None, None].expand(-1, short, 1)).squeeze(-1)


def _lanczos(T: Tensor, iterations: int, seed: int) -> Tensor:
    """Unit w (batch, short) that maximises ||T w|| over the Krylov space of T'T and one start."""
    batch, _, short = T.shape
    Q = gaussian_start(short, 1, seed, T).expand(batch, -1, -1)
    eps = torch.finfo(T.dtype).eps
    for _ in range(min(iterations, short - 1)):
        z = T.mT @ (T @ Q[..., -1:])
        before = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            z = z - Q @ (Q.mT @ z)
        norm = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
        # Nothing but rounding left: the space is invariant. A zero column stays zero and changes nothing.
        Q = torch.cat([Q, torch.where(norm > 10 * eps * before, z / norm, 0.0)], -1)
    Y = T @ Q
    w = _apply(Q, torch.linalg.eigh(Y.mT @ Y).eigenvectors[..., -1])
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return torch.where(norm > 0, w / norm, Q[..., 0])  # for T = 0 the eigenvector may sit on a zero column
