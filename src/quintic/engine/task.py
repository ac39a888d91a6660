"""What the loop needs to know of a thing to be trained.

A task turns example numbers into batches and batches into a loss. The loop knows nothing of language or
images; ``quintic.lm.task``, ``quintic.flow.task`` and ``quintic.diffusion.task`` satisfy this protocol structurally.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from quintic.core.loss import Loss
from quintic.core.ranks import ALONE, Ranks

__all__ = ["Batch", "Task"]

Batch = dict[str, Tensor]


class Task(Protocol):
    """Data, model and loss of one kind of training."""

    name: str
    """``lm``, ``tarflow`` or ``ddpm``."""
    fingerprint: str
    """Hash of the data and of how it is cut into examples; a resume refuses another one."""
    num_examples: int
    """Training examples in one epoch."""
    samples_whole: bool
    """Whether sampling looks at weights outside of a forward pass, so that divided ones are put together for it."""

    def build(self, seed: int | None = None, *, initialize: bool = True) -> nn.Module:
        """The model.

        Args:
            seed: Initial weights are a pure function of it; None draws it from torch's default generator.
            initialize: False leaves weights to be loaded.
        """
        ...

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Data and model in lines for a person, and as facts for ``run.json``."""
        ...

    def batch(self, examples: NDArray[np.int64]) -> Batch:
        """CPU tensors of these training examples, whose first axis is the example."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Loss of a batch on the model's device."""
        ...

    def after_step(self, model: nn.Module, progress: float) -> dict[str, Any]:
        """Work after an optimizer step (balance the experts); returns numbers to log.

        Args:
            model: The model.
            progress: Part of the training that is done, in (0, 1].
        """
        ...

    def step_metrics(self, loss: float) -> dict[str, float]:
        """More views of the mean loss of a step, such as bits per byte."""
        ...

    def evaluate(
        self, model: nn.Module, split: str, should_stop: Callable[[], bool], ranks: Ranks = ALONE
    ) -> dict[str, Any] | None:
        """Mean loss and its views on the ``validation`` or ``test`` split; None if stopped midway.

        All ranks call this together, and ``should_stop`` tells all of them the same.
        """
        ...

    def sample(self, model: nn.Module, path: Path, seed: int, should_stop: Callable[[], bool]) -> str:
        """Write a sample to ``path`` plus a suffix, and return it in words for the terminal."""
        ...

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one training example."""
        ...

    def save_with(self, folder: Path) -> None:
        """Write into a new run folder what a later use of the model needs (a tokenizer)."""
        ...
