"""A small U-Net: a noisy image and its noise level in, a prediction out (Ho et al. 2020; FiLM: Perez et al. 2018).

    pixels -> patch x patch pixels become channels -> levels down, middle with attention, levels up -> pixels

Every residual block is conv(silu(film(norm(conv(silu(norm(x))))))) + x, where film scales and shifts the channels by
numbers computed from log_snr and, if there are classes, from the class. Convolutions are matrices (out, in * 3 * 3) to
the optimizer; the first and last are embedding and head. Shapes: b batch, c channels, h and w of the level at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.core.roles import Constant, Normal, Role, declare
from quintic.core.settings import check_counts
from quintic.core.table import ModuleWithTable

__all__ = ["UNet"]

_GROUPS = 8
_FREQUENCIES = 16


class UNet(ModuleWithTable):
    """Noisy image and noise level to an image of the same shape.

    Args:
        shape: (channels, height, width) of the images.
        width: Channels of the finest level; each coarser one has twice as many. A multiple of 8.
        levels: Resolutions.
        blocks: Residual blocks per level, down and up each.
        patch: Pixels along each side that become channels first.
        heads: Of the attention at the coarsest level; 0 leaves it out.
        num_classes: 0 is without classes; else class ``num_classes`` stands for none.
        dropout: Share of channels' values zeroed in blocks while training.
        seed: Initial weights are a pure function of (seed, parameter name, position). None draws a seed from torch's
            default generator, so that ``torch.manual_seed`` governs them as it does those of ``torch.nn``.
        initialize: False leaves the weights to :func:`quintic.core.initial.initialize_` or a checkpoint.

    Raises:
        ConfigError: Sizes that do not fit.

    Example:
        >>> net = UNet((1, 8, 12), width=16, levels=2, blocks=1, patch=1, heads=2, seed=0)
        >>> net(torch.zeros(3, 1, 8, 12), torch.zeros(3)).shape
        torch.Size([3, 1, 8, 12])
    """

    frequencies: Tensor
    table_name = "frequencies"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        width: int = 48,
        levels: int = 2,
        blocks: int = 2,
        patch: int = 2,
        heads: int = 4,
        num_classes: int = 0,
        dropout: float = 0.0,
        seed: int | None = None,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ConfigError(f"the shape of an image is (channels, height, width), found {tuple(shape)}")
        channels, height, width_px = shape
        check_counts(channels=channels, height=height, width=width, levels=levels, blocks=blocks, patch=patch)
        check_counts(0, heads=heads, num_classes=num_classes)
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), found {dropout}")
        _check(height, width_px, width, levels, patch, heads)
        self.shape = shape
        self.patch = patch
        self.num_classes = num_classes
        d = 4 * width
        self.level_in = Linear(2 * _FREQUENCIES, d)
        self.level_out = Linear(d, d)
        if num_classes:
            self.classes = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, d), freeze=False)  # draws nothing
            declare(self.classes, "weight", Role.EMBEDDING, Normal(0.02))
        widths = [width << level for level in range(levels)]
        self.enter = Conv(channels * patch**2, widths[0], 3, role=Role.EMBEDDING)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        current, skips = widths[0], []
        for i, w in enumerate(widths):
            if i:
                self.down.append(Halve(current, w))
                current = w
            for _ in range(blocks):
                self.down.append(Block(current, w, d, dropout))
                current = w
                skips.append(w)
        self.middle = nn.ModuleList([Block(current, current, d, dropout)])
        if heads:
            self.middle.append(Attention(current, heads))
            self.middle.append(Block(current, current, d, dropout))
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                self.up.append(Block(current + skips.pop(), w, d, dropout))
                current = w
            if i:
                self.up.append(Double(current, widths[i - 1]))
                current = widths[i - 1]
        self.leave_norm = Norm(current)
        self.leave = Conv(current, channels * patch**2, 3, role=Role.HEAD, scale=0.0)
        self.register_table()
        if initialize:
            initialize_(self, seed)

    def compute_table(self) -> Tensor:
        """Frequencies of the embedding of log_snr."""
        # Not by torch.exp, whose last bit depends on the processor: the codec's exact mode would inherit it.
        ratio = math.log(2.0 / 0.05) / (_FREQUENCIES - 1)
        return torch.tensor([0.05 * math.exp(i * ratio) for i in range(_FREQUENCIES)], dtype=torch.float32)

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: (b, c, height, width).
            log_snr: (b,).
            labels: (b,) int64 classes; None is without class.

        Returns:
            (b, c, height, width).

        Raises:
            ConfigError: ``x`` has another shape, or labels for a model without classes.
        """
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ConfigError(f"this U-Net is for images {tuple(self.shape)}, found {tuple(x.shape[1:])}")
        angles = log_snr.to(x)[:, None] * self.frequencies
        embedded = self.level_out(F.silu(self.level_in(torch.cat([angles.sin(), angles.cos()], dim=1))))
        if self.num_classes:
            if labels is None:
                labels = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
            embedded = embedded + self.classes(labels)
        elif labels is not None:
            raise ConfigError("labels were given to a U-Net that was made without classes")
        embedded = F.silu(embedded)
        h = self.enter(F.pixel_unshuffle(x, self.patch))
        skips: list[Tensor] = []
        for part in self.down:
            h = part(h, embedded)
            if isinstance(part, Block):
                skips.append(h)
        for part in self.middle:
            h = part(h, embedded)
        for part in self.up:
            h = part(torch.cat([h, skips.pop()], dim=1) if isinstance(part, Block) else h, embedded)
        return F.pixel_shuffle(self.leave(F.silu(self.leave_norm(h))), self.patch)


def _check(height: int, width_px: int, width: int, levels: int, patch: int, heads: int) -> None:
    if width % _GROUPS:
        raise ConfigError(f"width must be a multiple of {_GROUPS}, found {width}")
    unit = patch << (levels - 1)
    if height % unit or width_px % unit:
        raise ConfigError(
            f"images of {height} x {width_px} pixels do not divide by patch * 2^(levels - 1) = {unit}; "
            "choose another patch or fewer levels, or images of another size"
        )
    if heads and (width << (levels - 1)) % heads:
        raise ConfigError(f"{width << (levels - 1)} channels of the coarsest level do not split into {heads} heads")


class Linear(nn.Module):
    """y = W x + b."""

    def __init__(self, d_in: int, d_out: int, *, scale: float = 1.0, row_blocks: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out))
        declare(self, "weight", Role.MATRIX, Normal(scale / math.sqrt(d_in)), row_blocks=row_blocks)
        declare(self, "bias", Role.VECTOR, Constant(0.0))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    """A convolution that keeps height and width; its weight is stored as a matrix (out, in * kernel * kernel)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, role: Role = Role.MATRIX, scale: float = 1.0) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(c_out, c_in * kernel**2))
        self.bias = nn.Parameter(torch.empty(c_out))
        declare(self, "weight", role, Normal(scale / (kernel * math.sqrt(c_in))))
        declare(self, "bias", Role.VECTOR, Constant(0.0))

    def extra_repr(self) -> str:
        """Sizes."""
        outputs, inputs = self.weight.shape
        return f"{inputs // self.kernel**2} -> {outputs}, {self.kernel} x {self.kernel}"

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h, w)."""
        weight = self.weight.view(len(self.weight), -1, self.kernel, self.kernel)
        return F.conv2d(x, weight, self.bias, padding=self.kernel // 2)


class Norm(nn.Module):
    """Group normalisation with gains and shifts per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        declare(self, "weight", Role.VECTOR, Constant(1.0))
        declare(self, "bias", Role.VECTOR, Constant(0.0))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{_GROUPS} groups, {len(self.weight)}"

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same shape."""
        return F.group_norm(x, _GROUPS, self.weight, self.bias)


class Block(nn.Module):
    """Residual block, modulated by the embedding of noise level and class."""

    def __init__(self, c_in: int, c_out: int, d: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = Norm(c_in)
        self.conv_in = Conv(c_in, c_out, 3)
        self.film = Linear(d, 2 * c_out, scale=0.1, row_blocks=2)
        self.norm_out = Norm(c_out)
        # Zero, so that a fresh block passes its input on.
        self.conv_out = Conv(c_out, c_out, 3, scale=0.0)
        self.skip = Conv(c_in, c_out, 1) if c_in != c_out else None
        self.dropout = dropout

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(b, in, h, w) and (b, d) -> (b, out, h, w)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.film(embedded)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_out(h) * (1.0 + scale) + shift)
        h = self.conv_out(F.dropout(h, self.dropout, self.training))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """Every position looks at every other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = Linear(channels, 3 * channels, row_blocks=3)
        self.out = Linear(channels, channels, scale=0.0)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(b, c, h, w) -> the same shape; the embedding is not used."""
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part.view(b, h * w, self.heads, -1).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(mixed).transpose(1, 2).view(b, c, h, w)


class Halve(nn.Module):
    """Half the height and width: each 2 x 2 positions to one, by a matrix."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Conv(4 * c_in, c_out, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(b, in, 2h, 2w) -> (b, out, h, w); the embedding is not used."""
        return self.conv(F.pixel_unshuffle(x, 2))


class Double(nn.Module):
    """Twice the height and width: each position to 2 x 2, by a matrix."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = Conv(c_in, 4 * c_out, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, 2h, 2w); the embedding is not used."""
        return F.pixel_shuffle(self.conv(x), 2)
