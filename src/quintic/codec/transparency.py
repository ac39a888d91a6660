"""Transparent pictures: what of them can be seen.

Where alpha is 0 a colour cannot be seen, whatever a file says of it: the encoder puts there what costs least, the
colours around continued, and cares the less for a colour the less of it shows. A decoder does not need to know.

A transparent picture has no look of its own. Its quality is measured on a black ground and on a white one, where the
value c of a pixel looks like alpha c and like alpha c + (1 - alpha): the mean squared error of both together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["TRANSPARENT", "continue_colours", "looks", "seen"]

Values = NDArray[np.float64]
TRANSPARENT = ("LA", "RGBA")
"""Modes of pictures whose last channel is alpha."""
_LEAST = 0.2
"""Weight of colours under alpha 0. Not 0: a decoded alpha is not exact, and where it is not 0 these colours show."""


def looks(image: Image.Image) -> Values:
    """What is seen of a picture, from 0 to 255: (height, width, ...), or of a transparent one (2, height, width, c)."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode not in TRANSPARENT:
        return values
    colours, alpha = values[:, :, :-1], values[:, :, -1:] / 255.0
    on_black = alpha * colours
    return np.stack([on_black, on_black + 255.0 * (1.0 - alpha)])


def seen(values: Values) -> Values:
    """Weights (height, width) of the colours of a transparent picture (height, width, c) in [-1, 1]."""
    return np.maximum((values[:, :, -1] + 1.0) / 2.0, _LEAST)


def continue_colours(values: Values) -> Values:
    """A transparent picture with other colours where alpha is 0: means of those that are seen around, ever wider.

    Args:
        values: (height, width, c) in [-1, 1], alpha last.

    Returns:
        Likewise; grey if nothing at all is seen.

    Example:
        >>> row = np.array([[[0.5, 1.0], [-1.0, -1.0], [-1.0, -1.0]]])
        >>> continue_colours(row)[0].tolist()
        [[0.5, 1.0], [0.5, -1.0], [0.5, -1.0]]
    """
    share = (values[:, :, -1:] + 1.0) / 2.0
    colours = np.where(share > 0.0, values[:, :, :-1], _spread(share * values[:, :, :-1], share))
    return np.concatenate([colours, values[:, :, -1:]], axis=2)


def _spread(sums: Values, shares: Values) -> Values:
    """Colours everywhere, from sums of colours times shares, and the shares: where they lack, those of a half size."""
    own = sums / np.maximum(shares, 1e-9)
    if (shares >= 1.0).all() or max(shares.shape[:2]) == 1:
        return own
    wider = _spread(_sums(sums), _sums(shares)).repeat(2, axis=0).repeat(2, axis=1)[: sums.shape[0], : sums.shape[1]]
    share = np.minimum(shares, 1.0)
    return share * own + (1.0 - share) * wider


def _sums(plane: Values) -> Values:
    """Of 2 x 2 pixels."""
    even = np.pad(plane, [(0, side % 2) for side in plane.shape[:2]] + [(0, 0)])
    return even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
