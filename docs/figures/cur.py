"""Post 10662: the error of columns by the rule that chose them, over the least error of that rank."""

from __future__ import annotations

import torch
from benchmarks.plot import Line, draw
from torch import Tensor

from quintic.data.drawings import draw as draw_shapes
from quintic.lowrank import select_columns

RULES = ("uniform", "norms-top", "leverage-top", "deim", "pivoted-qr", "fast", "quality")
RANKS = (5, 10, 20, 40, 80)


def pictures(count: int = 600, side: int = 16) -> Tensor:
    """(pixels, pictures): every column is a drawn shape."""
    images, _ = draw_shapes(count, side, 1, seed=0, label="figure")
    return torch.from_numpy(images).reshape(count, -1).T.double()


def excess(A: Tensor, k: int, rule: str) -> float:
    """||A - C C^+ A||_F over the error of the truncated SVD."""
    C = torch.linalg.qr(A[:, select_columns(A, k, method=rule)]).Q
    return float((A - C @ (C.T @ A)).norm() / torch.linalg.svdvals(A)[k:].norm())


def figure() -> str:
    """Error ratio over rank."""
    A = pictures()
    lines = [Line(rule, [float(k) for k in RANKS], [excess(A, k, rule) for k in RANKS]) for rule in RULES]
    return draw(
        "600 drawn shapes from k of themselves: error over the least of rank k", lines, x="k",
        y="error / least error", log_x=True,
    )  # fmt: skip
