"""Labels of images as rows of a class table whose last row stands for "no label"."""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.core import DataError

__all__ = ["class_rows"]


def class_rows(
    labels: Tensor | int | None, batch: int, classes: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Rows (b,) of a table of ``classes + 1``; None for a model without classes.

    Args:
        labels: Class or (b,) classes; None and -1 are "no label".
        batch: b.
        classes: Of the model; 0 is a model without.
        device: Of the result.

    Raises:
        DataError: A label out of range, or one for a model without classes.

    Example:
        >>> class_rows(torch.tensor([0, -1, 2]), 3, 10)
        tensor([ 0, 10,  2])
    """
    if not classes:
        if labels is not None:
            raise DataError("this flow has no classes; leave the labels out")
        return None
    found = torch.as_tensor(-1 if labels is None else labels, device=device)
    if found.is_floating_point() or found.dtype == torch.bool or found.shape not in ((), (batch,)):
        raise DataError(f"expected {batch} whole numbers as labels, found {tuple(found.shape)} of {found.dtype}")
    found = found.long().expand(batch)
    low, high = (int(v) for v in found.aminmax()) if batch else (0, 0)
    if low < -1 or high >= classes:
        raise DataError(f"labels are 0 to {classes - 1}, or -1 for none; found {low} to {high}")
    return torch.where(found < 0, classes, found)
