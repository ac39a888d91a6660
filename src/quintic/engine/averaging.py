"""Exponential moving average of the weights (Polyak averaging), which images models are sampled with.

After step t the average follows the weights with decay min(d, (1 + t) / (10 + t)), so that it forgets the initial
weights quickly. It is kept in float32 beside the model, whatever the model's dtype; buffers are not averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quintic.core import CheckpointError

__all__ = ["WeightAverage"]


class WeightAverage:
    """Averaged copies of a model's parameters.

    Args:
        model: Its parameters are the average's start.
        decay: d above; 0 keeps no average at all, and :meth:`applied` changes nothing.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model, decay=0.9)
        >>> before = model.weight.item()
        >>> _ = model.weight.data.add_(1.0)
        >>> average.update(step=0)
        >>> with average.applied():
        ...     inside = model.weight.item()
        >>> round(inside - before, 4), round(model.weight.item() - before, 4)
        (0.9, 1.0)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters()) if decay else {}
        self._decay = decay
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after a step.

        Args:
            step: Steps that were taken before this one.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again after, whatever happens."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: averaged tensor}; empty without an average."""
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from an average, divided as the model is.

        Raises:
            CheckpointError: It is of other parameters.
        """
        if state.keys() != self._average.keys():
            names = ", ".join(sorted(state.keys() ^ self._average.keys())[:3])
            raise CheckpointError(
                f"the averaged weights of the checkpoint are of other parameters ({names}); "
                "engine.ema_decay cannot be switched on or off within a run"
            )
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
