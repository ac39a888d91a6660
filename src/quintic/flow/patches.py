"""Images as sequences of square patches.

(b, c, h, w) <-> (b, n, d) with n = (h / p) (w / p) tokens, row by row, of d = c p p numbers: channel, row, column.
"""

from __future__ import annotations

from torch import Tensor

from quintic.core import ConfigError
from quintic.core.settings import check_counts

__all__ = ["check_patch", "to_image", "to_tokens"]


def check_patch(shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """Number of tokens of an image and of numbers in a token.

    Raises:
        ConfigError: No such shape, or the patch does not divide the image, or leaves a single token.
    """
    if len(shape) != 3:
        raise ConfigError(f"the shape of an image is (channels, height, width), found {tuple(shape)}")
    c, h, w = shape
    check_counts(channels=c, height=h, width=w)
    if patch < 1 or h % patch or w % patch:
        both = [p for p in range(1, min(h, w) + 1) if h % p == 0 and w % p == 0]
        raise ConfigError(
            f"images of {h} x {w} pixels do not divide into patches of {patch} x {patch}; possible: {both}"
        )
    tokens = (h // patch) * (w // patch)
    if tokens < 2:
        raise ConfigError(f"a patch of {patch} leaves one token of an image of {h} x {w}; a flow needs at least two")
    return tokens, c * patch * patch


def to_tokens(images: Tensor, patch: int) -> Tensor:
    """(b, c, h, w) -> (b, n, d)."""
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def to_image(tokens: Tensor, shape: tuple[int, int, int], patch: int) -> Tensor:
    """(b, n, d) -> (b, c, h, w).

    Example:
        >>> import torch
        >>> image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
        >>> bool((to_image(to_tokens(image, 2), (3, 4, 6), 2) == image).all())
        True
    """
    c, h, w = shape
    grid = tokens.reshape(len(tokens), h // patch, w // patch, c, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), c, h, w)
