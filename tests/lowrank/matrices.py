"""Matrices that are hard in known ways, and independent measures."""

import numpy as np
import torch


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(m, n, values, seed=0, dtype=torch.float64):
    k = len(values)
    U = torch.linalg.qr(randn(m, k, seed=seed, dtype=dtype)).Q
    V = torch.linalg.qr(randn(n, k, seed=seed + 1, dtype=dtype)).Q
    return U * torch.as_tensor(values, dtype=U.real.dtype) @ V.mH


def hilbert(n, dtype=torch.float64):
    i = torch.arange(n, dtype=dtype)
    return 1 / (i[:, None] + i + 1)


def kahan(n, theta=1.2, shift=0.0):
    s, c = np.sin(theta), np.cos(theta)
    K = np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    return torch.from_numpy(K + shift * np.finfo(float).eps * np.diag(np.arange(n, 0, -1)))


def snn(m=300, n=240, seed=0):
    """Sums of sparse non-negative outer products with falling weights."""
    rng = np.random.default_rng(seed)
    r = min(m, n)
    weight = np.where(np.arange(1, r + 1) <= 30, 10.0, 1.0) / np.arange(1, r + 1)
    left = rng.random((m, r)) * (rng.random((m, r)) < 0.025)
    right = rng.random((n, r)) * (rng.random((n, r)) < 0.025)
    return torch.from_numpy((left * weight) @ right.T)


def outliers(m=300, bulk=500, alone=30, rank=20, seed=0):
    """Unit columns of a low rank, and a few longer ones at right angles to nearly everything."""
    low = randn(m, rank, seed=seed) @ randn(rank, bulk, seed=seed + 1)
    far = randn(m, alone, seed=seed + 2)
    return torch.cat([low / low.norm(dim=0), 1.3 * far / far.norm(dim=0)], 1)


def duplicates(m=40, different=5, times=6, seed=0):
    return randn(m, different, seed=seed).repeat(1, times)


def best(A, k):
    """The smallest error of any approximation of rank k."""
    return torch.linalg.vector_norm(torch.linalg.svdvals(A)[k:])


def column_error(A, at):
    """||A - C C^+ A||_F by least squares, apart from the package."""
    C = A[:, torch.as_tensor(at)].numpy()
    return float(np.linalg.norm(A.numpy() - C @ np.linalg.lstsq(C, A.numpy(), rcond=None)[0]))


def relative(A, B):
    return float(
        torch.linalg.vector_norm(torch.as_tensor(A) - torch.as_tensor(B)) / torch.linalg.vector_norm(torch.as_tensor(A))
    )


class ByProducts:
    """An operator: four names, tensors in and out."""

    def __init__(self, A):
        self.A, self.shape, self.dtype = A, tuple(A.shape), A.dtype
        self.calls = 0

    def matmat(self, X):
        self.calls += 1
        return self.A @ X

    def rmatmat(self, X):
        self.calls += 1
        return self.A.mH @ X
