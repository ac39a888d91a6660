"""Models of the density of 28 x 28 grey images, ours and those of zuko and normflows, behind one ``log_prob``.

Each takes pixels in [-1, 1] and, but for a TARFLOW that is told otherwise, models their logits; the Jacobian of that
counts. Initial weights come from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core.initial import initialize_
from quintic.flow import TarFlow
from quintic.flow.likelihood import logit_forward
from quintic.flow.spline import Spline

SHAPE = (1, 28, 28)
DIMS = 784


class Peer(nn.Module):
    """A density over logits as a density over pixels; flat where the peer wants it flat, behind a spline if told so."""

    def __init__(
        self, flow: nn.Module, log_prob: Callable[[Any, Tensor], Tensor], flat: bool, spline_bins: int = 0
    ) -> None:
        super().__init__()
        self.flow, self._log_prob, self.flat = flow, log_prob, flat
        self.spline = Spline(spline_bins, 3.0) if spline_bins else None
        if self.spline is not None:
            initialize_(self.spline, 0)

    def log_prob(self, x: Tensor) -> Tensor:
        u, logdet = logit_forward(x)
        if self.spline is not None:
            u, more = self.spline(u)
            logdet = logdet + more
        return self._log_prob(self.flow, u.flatten(1) if self.flat else u) + logdet


def tarflow(
    patch: int = 4,
    width: int = 64,
    blocks: int = 4,
    layers: int = 2,
    preprocess: str = "logit",
    spline_bins: int = 0,
    inner_width: int = 0,
) -> nn.Module:
    return TarFlow(
        SHAPE, patch=patch, width=width, blocks=blocks, layers=layers, noise="uniform", preprocess=preprocess,
        spline_bins=spline_bins, inner_width=inner_width, seed=int(torch.randint(2**31, ())),
    )  # fmt: skip


def maf() -> nn.Module:
    import zuko

    flow = zuko.flows.MAF(DIMS, transforms=5, hidden_features=(512, 512))
    return Peer(flow, lambda f, u: f().log_prob(u), True)


def spline() -> nn.Module:
    import zuko

    flow = zuko.flows.NSF(DIMS, transforms=3, hidden_features=(256, 256), bins=8)
    return Peer(flow, lambda f, u: f().log_prob(u), True)


def realnvp() -> nn.Module:
    """Couplings over pixels in turns, as in its authors' toy."""
    import normflows as nf

    mask = torch.arange(DIMS) % 2
    layers = []
    for i in range(8):
        nets = [nf.nets.MLP([DIMS, 256, DIMS], init_zeros=True) for _ in range(2)]
        layers += [nf.flows.MaskedAffineFlow(mask if i % 2 else 1 - mask, *nets), nf.flows.ActNorm(DIMS)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(DIMS, trainable=False), layers)
    return Peer(flow, lambda f, u: f.log_prob(u), True)


def glow(steps: int = 8, hidden: int = 64, spline_bins: int = 0) -> nn.Module:
    """Two levels, as many as 28 divides into by 4."""
    import normflows as nf

    levels = 2
    bases, merges, flows = [], [], []
    for i in range(levels):
        channels = 2 ** (levels + 1 - i)
        flows.append([nf.flows.GlowBlock(channels, hidden) for _ in range(steps)] + [nf.flows.Squeeze()])
        side = 28 // 2 ** (levels - i)
        if i > 0:
            merges.append(nf.flows.Merge())
        bases.append(nf.distributions.DiagGaussian((channels if i == 0 else channels // 2, side, side)))
    flow = nf.MultiscaleFlow(bases, flows, merges)
    return Peer(flow, lambda f, u: f.log_prob(u, None), False, spline_bins)
