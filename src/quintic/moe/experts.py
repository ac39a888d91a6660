"""A stack of feed-forward networks, of which each token visits k.

The stack is one parameter per projection, (experts, out, in): the layout of transformers since version 5, and what
an optimizer of matrices batches over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quintic.core.roles import Normal, Role, declare
from quintic.moe.activation import check_activation
from quintic.moe.routed import routed_experts

__all__ = ["Experts"]


class Experts(nn.Module):
    """A stack of feed-forward networks without biases.

    Args:
        d_model: Width in and out.
        d_expert: Hidden width of one expert.
        num_experts: E.
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
        gated: Whether the activation of one projection multiplies another.
        normalize: Whether an expert's output is divided by its RMS.
        out_scale: Factor of the initial standard deviation of the output projections.

    Raises:
        ConfigError: The activation is unknown.

    The input projections are ``gate_up`` (experts, 2 * hidden, width), gate rows first, or ``up``.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        normalize: bool = False,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.gated = gated
        self.normalize = normalize
        height = 2 * d_expert if gated else d_expert
        self.register_parameter(self.in_name, nn.Parameter(torch.empty(num_experts, height, d_model)))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        declare(self, self.in_name, Role.EXPERT_STACK, Normal(1.0 / math.sqrt(d_model)), row_blocks=2 if gated else 1)
        declare(self, "down", Role.EXPERT_STACK, Normal(out_scale / math.sqrt(d_expert)))

    @property
    def in_name(self) -> str:
        """Name of the input projections."""
        return "gate_up" if self.gated else "up"

    def extra_repr(self) -> str:
        """Sizes and activation."""
        experts, width, hidden = self.down.shape
        kind = f"{'gated ' if self.gated else ''}{self.activation}{', unit RMS' if self.normalize else ''}"
        return f"{experts} x ({width} -> {hidden} -> {width}), {kind}"

    def forward(self, x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """sum over the k choices of gate * expert(x): (tokens, width) -> (tokens, width); ``plus``, alike, is added."""
        return routed_experts(
            x_nd, ids_nk, gates_nk, getattr(self, self.in_name), self.down,
            activation=self.activation, normalize=self.normalize, plus_nd=plus,
        )  # fmt: skip
