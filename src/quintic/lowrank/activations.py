"""What a layer sees of calibration data, as second moments: enough to fit and to measure any linear map of it.

    G = sum of w^2 [x 1]' [x 1]       |[X 1] D'|_F^2 = tr(D G D')     for rows X of activations with weights w

Sums are in float64, whose squared condition number still resolves whatever float32 activations hold. Only G is kept:
memory does not depend on the amount of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quintic.core import ConfigError, DataError
from quintic.core.precision import in_float64

__all__ = ["Add", "Forward", "Map", "Moments", "Watched", "observe", "total_error"]

_RIDGE = 1e-6
"""Times the mean square of an activation: for directions that the data does not show, and for what saw no data."""

Add = Callable[[int, Tensor], None]
"""(part, rows (n, width)): what a watched layer reports."""
Forward = Callable[[nn.Module, Any], Any]
"""(module, batch): runs the module."""
Map = tuple[Tensor, Tensor]
"""(out, width) weight and (out,) bias."""


class Moments:
    """Second moments of rows of activations.

    Args:
        width: Of a row.
    """

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device="cpu")
        """(width + 1, width + 1) G; the last row and column belong to the constant."""
        self.rows = 0
        """Rows that were seen."""

    def add(self, rows: Tensor) -> None:
        """Count (n, width) rows in."""
        x = in_float64(rows.detach())
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.gram = self.gram.to(x.device)
        self.gram += x.t() @ x
        self.rows += len(x)

    @property
    def mean(self) -> Tensor:
        """(width,) mean of the rows; zeros if there are none."""
        return self.gram[-1, :-1] / self.gram[-1, -1].clamp(min=1.0)

    def factor(self, *, centred: bool) -> Tensor:
        """T (width, width) with |T V| = |X V| for every V, of the rows themselves or less their mean.

        A little of the identity is added, so that what no row shows is taken to be small, equal and uncorrelated.
        """
        gram, mean = self.gram[:-1, :-1], self.mean
        if centred:
            gram = gram - self.gram[-1, -1] * mean.outer(mean)
        size = float(gram.diagonal().mean())
        ridge = _RIDGE * size if size > 0 else 1.0
        values, vectors = torch.linalg.eigh(gram)
        return (values.clamp(min=0) + ridge).sqrt()[:, None] * vectors.t()

    def squares(self, weight: Tensor, bias: Tensor) -> float:
        """|X W' + b|_F^2 of a linear map: W (out, width), b (out)."""
        whole = torch.cat([weight, bias[:, None]], 1).to(self.gram)
        return max(0.0, float((whole @ self.gram * whole).sum()))


class Watched(Protocol):
    """A layer of a model that can be observed."""

    name: str

    @property
    def parts(self) -> int:
        """Independent maps of equal shape: 1, or experts."""
        ...

    @property
    def width(self) -> int:
        """Of what is reported."""
        ...

    def watch(self, add: Add) -> RemovableHandle:
        """Report activations of every forward pass until the handle is removed."""
        ...


@torch.no_grad()
def observe(
    model: nn.Module, layers: Sequence[Watched], batches: Iterable[Any], forward: Forward | None, what: str
) -> dict[str, list[Moments]]:
    """Run a model over batches, in evaluation mode, and return the moments of every layer's parts.

    Raises:
        DataError: There are no batches, or an activation is not finite.
        ConfigError: A layer was never reached.
    """
    found = {layer.name: [Moments(layer.width) for _ in range(layer.parts)] for layer in layers}
    number = 0

    def reporter(name: str) -> Add:
        def add(part: int, rows: Tensor) -> None:
            if not torch.isfinite(rows).all():
                raise DataError(
                    f"{what}, batch {number}: an activation of layer {name!r} is not finite; "
                    "look for such values in the data and in the weights"
                )
            found[name][part].add(rows)

        return add

    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.watch(reporter(layer.name)) for layer in layers]
    model.eval()
    try:
        for batch in batches:
            (forward or _call)(model, batch)
            number += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if number == 0:
        raise DataError(f"{what} is empty; expected at least one batch (an iterator can be read only once)")
    idle = [name for name, parts in found.items() if not any(moments.rows for moments in parts)]
    if idle:
        raise ConfigError(
            f"{what} never reached layer {idle[0]!r}; name the layers that it reaches with layers=..., "
            "or pass forward=... if the model is run in another way"
        )
    return found


def total_error(parts: Sequence[Moments], changes: Sequence[Map], wholes: Sequence[Map]) -> float:
    """Relative error of outputs over all parts: sqrt(sum |X D'|^2 / sum |X W'|^2)."""
    off = sum(moments.squares(*change) for moments, change in zip(parts, changes, strict=True))
    whole = sum(moments.squares(*each) for moments, each in zip(parts, wholes, strict=True))
    if whole > 0:
        return math.sqrt(off / whole)
    return 0.0 if off == 0 else math.inf


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)
