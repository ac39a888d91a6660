"""Post 10592: what five steps of each polynomial make of a singular value."""

from __future__ import annotations

import numpy as np
from benchmarks.plot import Line, draw

from quintic.linalg import resolve_schedule

PRESETS = ("taylor", "keller", "quintic", "polar-express")


def after(coefficients: str, sigma: np.ndarray, steps: int = 5) -> np.ndarray:
    """p_T(...p_1(sigma)), the singular values of msign computed so."""
    for a, b, c in resolve_schedule(coefficients, steps):
        sigma = sigma * (a + b * sigma**2 + c * sigma**4)
    return sigma


def figure() -> str:
    """Singular values after msign over those before it."""
    sigma = np.geomspace(1e-3, 0.2, 600)  # above it the curves only go on as they do
    lines = [Line(name, sigma.tolist(), after(name, sigma).tolist()) for name in PRESETS]
    return draw(
        "Five Newton-Schulz steps: what becomes of each singular value",
        lines, x="singular value of M / ||M||_F", y="singular value afterwards", log_x=True, marks=False,
    )  # fmt: skip
