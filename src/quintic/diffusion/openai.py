"""Checkpoints of openai/improved-diffusion and openai/guided-diffusion (state dicts in a ``.pt`` file).

The files hold weights alone; the sizes are those of the flags that the two repositories list for each checkpoint, and
are given here under the same names. The network below is written from their published form (MIT licence, Nichol and
Dhariwal 2021) with the same parameter names. Files are read without running any pickled code.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.diffusion.denoiser import tensors_fingerprint
from quintic.diffusion.stepwise import StepwiseDenoiser

__all__ = ["OpenAIFlags", "load_openai", "named_betas"]

_MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)
}  # fmt: skip


@dataclass(frozen=True)
class OpenAIFlags:
    """The command line flags of a checkpoint, under their own names.

    Raises:
        ConfigError: A value that the repositories do not know.
    """

    image_size: int = 64
    """Height and width."""
    num_channels: int = 128
    """Channels of the first level."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    channel_mult: str = ""
    """Channels of each level over ``num_channels``, such as 1,2,2,2; empty follows ``image_size``."""
    attention_resolutions: str = "16,8"
    """Heights at which there is attention."""
    num_heads: int = 4
    """Attention heads."""
    num_heads_upsample: int = -1
    """Attention heads on the way up; -1 is ``num_heads``."""
    num_head_channels: int = -1
    """Channels of a head; if given, ``num_heads`` is not used."""
    class_cond: bool = False
    """Whether there are classes."""
    learn_sigma: bool = False
    """Whether the output has a variance behind the prediction."""
    use_scale_shift_norm: bool = True
    """Whether the embedding scales as well as shifts."""
    resblock_updown: bool = False
    """Whether residual blocks change the resolution."""
    use_new_attention_order: bool = False
    """Whether queries, keys and values are split before the heads."""
    diffusion_steps: int = 1000
    """Numbered steps."""
    noise_schedule: str = "linear"
    """linear or cosine."""
    predict_xstart: bool = False
    """Whether the network predicts the clean image instead of the noise."""
    rescale_timesteps: bool = False
    """Whether step numbers are scaled to a thousand (the default of improved-diffusion)."""

    def __post_init__(self) -> None:
        if self.noise_schedule not in ("linear", "cosine"):
            raise ConfigError(f"unknown noise_schedule {self.noise_schedule!r}; expected linear or cosine")
        if not self.channel_mult and self.image_size not in _MULTIPLIERS:
            raise ConfigError(f"images of {self.image_size} pixels need channel_mult, such as channel_mult='1,2,2'")

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Channels of each level over ``num_channels``."""
        if self.channel_mult:
            return tuple(float(part) for part in self.channel_mult.split(","))
        return _MULTIPLIERS[self.image_size]

    @property
    def attention_rates(self) -> set[int]:
        """Factors by which the resolution is reduced where there is attention."""
        return {self.image_size // int(part) for part in self.attention_resolutions.split(",") if part}


def named_betas(name: str, steps: int) -> NDArray[np.float64]:
    """The noise added at each step: ``linear`` (Ho et al. 2020) or ``cosine`` (Nichol and Dhariwal 2021)."""
    if name == "linear":
        return np.linspace(0.1 / steps, 20.0 / steps, steps)
    ends = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - ends[1:] / ends[:-1], 0.999).astype(np.float64)


def load_openai(path: Path, **flags: Any) -> StepwiseDenoiser:
    """Read a state dict.

    Args:
        path: The ``.pt`` file.
        **flags: See :class:`OpenAIFlags`; those of the repository's README for this file.

    Raises:
        ConfigError: Unknown flag.
        CheckpointError: The file is missing, is no state dict of tensors, or does not fit the flags.
    """
    known = OpenAIFlags.__dataclass_fields__
    for name in flags:
        if name not in known:
            raise ConfigError(f"unknown flag {name!r}{suggest(name, known)}")
    options = OpenAIFlags(**flags)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path} as a state dict of tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict: expected names and tensors")
    if "input_blocks.0.0.weight" not in state:
        raise CheckpointError(f"{path} has no 'input_blocks.0.0.weight': not a model of these repositories")
    channels = state["input_blocks.0.0.weight"].shape[1]
    num_classes = len(state["label_emb.weight"]) if options.class_cond and "label_emb.weight" in state else 0
    network = _UNet(channels, num_classes, options)
    try:
        network.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:4])
        raise CheckpointError(f"{path} does not fit these flags; are they those of its README?\n{lines}") from error
    network.eval().requires_grad_(False)
    scale = 1000.0 / options.diffusion_steps if options.rescale_timesteps else 1.0
    return StepwiseDenoiser(
        lambda x, step, labels: network(x, step * scale, labels),
        np.cumprod(1.0 - named_betas(options.noise_schedule, options.diffusion_steps), dtype=np.float64),
        "x0" if options.predict_xstart else "eps",
        (channels, options.image_size, options.image_size),
        tensors_fingerprint(state, json.dumps(asdict(options), sort_keys=True)),
        num_classes,
    )


class _Sequence(nn.ModuleList):
    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedded) if isinstance(layer, _Block) else layer(x)
        return x


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Block(nn.Module):
    """Residual block; ``resize`` is 2 to double the resolution inside, 0.5 to halve it."""

    def __init__(self, c_in: int, c_out: int, d: int, film: bool, resize: float = 1.0) -> None:
        super().__init__()
        self.film, self.resize = film, resize
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * c_out if film else c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self._resized(self.in_layers[:2](x))
        h = self.in_layers[2](h)
        given = self.emb_layers(embedded)[:, :, None, None]
        if self.film:
            scale, shift = given.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1.0 + scale) + shift)
        else:
            h = self.out_layers(h + given)
        return self.skip_connection(self._resized(x)) + h

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == 1.0:
            return x
        return F.avg_pool2d(x, 2) if self.resize < 1.0 else F.interpolate(x, scale_factor=2, mode="nearest")


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, head_channels: int, split_first: bool) -> None:
        super().__init__()
        self.heads = heads if head_channels == -1 else channels // head_channels
        self.split_first = split_first
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        axes = (3, self.heads) if self.split_first else (self.heads, 3)
        qkv = qkv.view(b, *axes, c // self.heads, -1)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1 if self.split_first else 2))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, -1)
        return (flat + self.proj_out(mixed)).view(b, c, height, width)


class _UNet(nn.Module):
    def __init__(self, channels: int, num_classes: int, o: OpenAIFlags) -> None:
        super().__init__()
        first, d = o.num_channels, 4 * o.num_channels
        self.width = first
        self.time_embed = nn.Sequential(nn.Linear(first, d), nn.SiLU(), nn.Linear(d, d))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, d)
        widths = [int(multiplier * first) for multiplier in o.multipliers]

        def block(c_in: int, c_out: int, resize: float = 1.0) -> _Block:
            return _Block(c_in, c_out, d, o.use_scale_shift_norm, resize)

        def attention(c: int, heads: int) -> _Attention:
            return _Attention(c, heads, o.num_head_channels, o.use_new_attention_order)

        self.input_blocks = nn.ModuleList([_Sequence([nn.Conv2d(channels, widths[0], 3, padding=1)])])
        c, rate, skips = widths[0], 1, [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(o.num_res_blocks):
                layers: list[nn.Module] = [block(c, width)]
                c = width
                if rate in o.attention_rates:
                    layers.append(attention(c, o.num_heads))
                self.input_blocks.append(_Sequence(layers))
                skips.append(c)
            if level + 1 < len(widths):
                self.input_blocks.append(_Sequence([block(c, c, 0.5) if o.resblock_updown else _Down(c)]))
                skips.append(c)
                rate *= 2
        self.middle_block = _Sequence([block(c, c), attention(c, o.num_heads), block(c, c)])
        self.output_blocks = nn.ModuleList()
        heads_up = o.num_heads if o.num_heads_upsample == -1 else o.num_heads_upsample
        for level, width in reversed(list(enumerate(widths))):
            for i in range(o.num_res_blocks + 1):
                layers = [block(c + skips.pop(), width)]
                c = width
                if rate in o.attention_rates:
                    layers.append(attention(c, heads_up))
                if level and i == o.num_res_blocks:
                    layers.append(block(c, c, 2.0) if o.resblock_updown else _Up(c))
                    rate //= 2
                self.output_blocks.append(_Sequence(layers))
        out = 2 * channels if o.learn_sigma else channels
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(widths[0], out, 3, padding=1))

    def forward(self, x: Tensor, step: Tensor, labels: Tensor | None) -> Tensor:
        half = self.width // 2
        angles = step[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device) / half)
        features = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, self.width - 2 * half))
        embedded = self.time_embed(features)
        if labels is not None:
            embedded = embedded + self.label_emb(labels)
        skips, h = [], x
        for module in self.input_blocks:
            h = module(h, embedded)
            skips.append(h)
        h = self.middle_block(h, embedded)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), embedded)
        return self.out(h)
