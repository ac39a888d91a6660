"""Where guesses begin: a linear map from the latents of a block to its inputs.

    x ~ A z + b, for every block in its own order, by least squares over samples of the flow

Only a start: what is found from it is as exact, and as well checked, as from any other (:mod:`quintic.flow.invert`).
Linear maps explain most of what a block does, and still save few sweeps, about one in ten of the shipped flow's: the
last digits take most of them. There is one matrix of (n d)^2 numbers for every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.core.settings import check_counts

if TYPE_CHECKING:
    from quintic.flow.tarflow import TarFlow

__all__ = ["LinearGuess"]

_BATCH = 256
_MOST = 4096
"""Numbers of an image up to which a matrix is kept."""


@dataclass(frozen=True)
class LinearGuess:
    """A first guess of every block's inverse."""

    matrices: Tensor
    """(blocks, n d, n d), applied from the right."""
    shifts: Tensor
    """(blocks, n d)."""

    @classmethod
    @torch.no_grad()
    def fit(
        cls, model: TarFlow, samples: int = 4000, labels: Tensor | int | None = None, *, seed: int = 0
    ) -> LinearGuess:
        """Learn it from samples of the flow, drawn token by token.

        Args:
            model: A flow whose direction is ``density``.
            samples: How many; several times the numbers of an image.
            labels: As of :meth:`TarFlow.sample`.
            seed: Of the samples.

        Raises:
            ConfigError: Another direction, too few samples, or images too large for a matrix.
        """
        if model.direction != "density":
            raise ConfigError("this flow samples in one parallel pass and guesses nothing")
        if model.dims > _MOST:
            raise ConfigError(f"a linear guess is for up to {_MOST} numbers an image, this flow's have {model.dims}")
        check_counts(2, samples=samples)
        images = model.sample(samples, labels, seed=seed, method="sequential", denoise=False, batch=_BATCH).images
        x, rows = model.as_tokens(images)[0], model.rows(labels, samples)
        matrices, shifts = [], []
        for block in model.stack:
            parts = [slice(first, first + _BATCH) for first in range(0, samples, _BATCH)]
            z = torch.cat([block(x[part], None if rows is None else rows[part])[0] for part in parts])
            # On the CPU first: not every device has float64.
            one, other = (block.ordered(v).flatten(1).cpu().double() for v in (z, x))
            centre, target = one.mean(0), other.mean(0)
            one, other = one - centre, other - target
            # A hundredth of the latents' own size keeps the map sane where samples say nothing.
            square = one.T @ one + 0.01 * one.square().sum(0).mean() * torch.eye(
                model.dims, dtype=one.dtype, device="cpu"
            )
            matrix = torch.linalg.solve(square, one.T @ other)
            matrices.append(matrix.to(z))
            shifts.append((target - centre @ matrix).to(z))
            x = z
        return cls(torch.stack(matrices), torch.stack(shifts))

    def __call__(self, block: int, z_bnd: Tensor) -> Tensor:
        """x of a block guessed from z, both (b, n, d) in the block's order."""
        return torch.addmm(self.shifts[block], z_bnd.flatten(1), self.matrices[block]).view_as(z_bnd)
