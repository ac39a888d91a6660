"""After an optimizer step: the biases of all layers move, the counters start again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from quintic.core import ConfigError
from quintic.moe.meter import UNIT
from quintic.moe.stats import ExpertStats

if TYPE_CHECKING:
    from quintic.moe.layer import MoE

__all__ = ["collect_aux_loss", "update_layers"]


def update_layers(
    layers: list[MoE], group: dist.ProcessGroup | None = None, progress: float | None = None
) -> list[ExpertStats]:
    """What :func:`quintic.moe.balance_step` does with the MoE layers of a model.

    Args:
        layers: All of them, in the same order on every rank.
        group: Processes whose counts are added, in one all-reduce; None is all of them, if there is a process group.
        progress: Part of the training done, for the schedule of a rate.
    """
    for layer in layers:
        if layer.meter.losses:
            raise ConfigError(
                "the auxiliary loss of this step was never used; add it to the model's loss before backward: "
                "loss = loss + aux_loss(model)"
            )
    counters = [counter for layer in layers for counter in layer.meter.counters]
    if layers and dist.is_available() and dist.is_initialized():
        _all_reduce(counters, group)
    counted = _on_cpu(counters)
    biases = _on_cpu([layer.router.bias for layer in layers])
    for index, layer in enumerate(layers):
        counts_e, histogram_eb, sums = counted[3 * index : 3 * index + 3]
        bias_e, top_k = biases[index], layer.router.top_k
        layer.balance.step(bias_e, counts_e, top_k, histogram_eb=histogram_eb, progress=progress)
        layer.router.bias.copy_(bias_e)
        entropy, scored, aux, passes = sums.tolist()
        layer.stats = ExpertStats.from_counts(
            counts_e,
            top_k,
            bias_e=bias_e,
            entropy=entropy * UNIT / scored if scored else None,
            aux_loss=aux * UNIT / passes if passes else None,
        )
        layer.meter.reset()
        layer.kept.clear()
    return [layer.stats for layer in layers if layer.stats is not None]


def collect_aux_loss(layers: Iterable[MoE]) -> Tensor:
    """What :func:`quintic.moe.aux_loss` does with the MoE layers of a model."""
    losses: list[Tensor] = []
    device = torch.device("cpu")
    for layer in layers:
        device = layer.router.weight.device
        trained = layer.router.weight.requires_grad and torch.is_grad_enabled()
        if trained and any(not loss.requires_grad for loss in layer.meter.losses):
            raise ConfigError(
                "an auxiliary loss has no graph: its layer ran without gradients, as under torch.no_grad or "
                "checkpoint(use_reentrant=True). Use use_reentrant=False, or balance by LossFree, which needs no loss"
            )
        losses += layer.meter.losses
        layer.meter.losses = []
    return torch.stack(losses).sum() if losses else torch.zeros((), device=device)


def _on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, by one transfer from each device: the host waits once, not for every layer."""
    copies: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        here = {index: tensor for index, tensor in enumerate(tensors) if tensor.device == device}
        whole = torch.cat([tensor.flatten() for tensor in here.values()]).cpu()
        parts = whole.split([tensor.numel() for tensor in here.values()])
        copies |= {index: part.view(tensor.shape) for (index, tensor), part in zip(here.items(), parts, strict=True)}
    return [copies[index] for index in range(len(tensors))]


def _all_reduce(counters: list[Tensor], group: dist.ProcessGroup | None) -> None:
    whole = torch.cat([counter.flatten() for counter in counters])
    dist.all_reduce(whole, group=group)
    for counter, part in zip(counters, whole.split([counter.numel() for counter in counters]), strict=True):
        counter.copy_(part.view_as(counter))
