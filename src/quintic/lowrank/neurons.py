"""Which neurons of a hidden layer are kept, and what the next layer makes of them.

With H the activations (their moments are enough), W and b the next layer, J the neurons kept:

    H ~ H[:, J] Z,   Z = H[:, J]^+ H       W' = W Z'       b' = b + W (mean - Z' mean[J])

H and the pseudo-inverse are those of activations less their mean where there is a b, which takes up the constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.lowrank.activations import Moments
from quintic.lowrank.interpolation import interpolative
from quintic.lowrank.layers import HiddenLayer
from quintic.lowrank.selection import Method, select_columns

__all__ = ["WEIGHT_NORMS", "NeuronFit", "fit_neurons"]

WEIGHT_NORMS = "weight-norms"
"""The rule that looks at no activations: the largest product of the norms of the weights going in and out."""


@dataclass(frozen=True)
class NeuronFit:
    """Neurons of one part of a hidden layer."""

    kept: Tensor
    """(k,) ascending."""
    weight: Tensor
    """(d, k) W' of the next layer."""
    bias: Tensor | None
    """(d,) b' of the next layer."""
    change: tuple[Tensor, Tensor]
    """(d, f) and (d,): what became of W and b, with zeros for W' where neurons are gone."""
    whole: tuple[Tensor, Tensor]
    """(d, f) and (d,): W and b."""


def fit_neurons(
    layer: HiddenLayer, part: int, moments: Moments, k: int, rule: Method, correct: bool, seed: int
) -> NeuronFit:
    """Choose k neurons of a part and fit the next layer to them.

    Args:
        layer: The hidden layer.
        part: Which of its experts, 0 if it is one network.
        moments: Of the activations of that part.
        k: 1 to f.
        rule: Of :data:`quintic.lowrank.RULES`, applied to the columns of H times the norms of their outgoing weights,
            or :data:`WEIGHT_NORMS`.
        correct: Whether W' is fitted; else it is W[:, J].
        seed: Of what the rule draws.
    """
    outgoing, constant = layer.outgoing(part)
    W = outgoing.to(moments.gram)
    b = W.new_zeros(len(W)) if constant is None else constant.detach().to(W)
    T = moments.factor(centred=constant is not None)
    weighed = torch.linalg.vector_norm(W, dim=0)
    if rule == WEIGHT_NORMS:
        kept = (layer.incoming(part).to(W) * weighed).topk(k).indices
    else:
        kept = select_columns(T * weighed, k, method=rule, seed=seed)
    kept = kept.sort().values
    weight, bias = W[:, kept], b
    if correct:
        Z = interpolative(T, indices=kept).Z
        weight = W @ Z.t()
        if constant is not None:
            bias = b + W @ (moments.mean - Z.t() @ moments.mean[kept])
    change = (-W).index_add(1, kept, weight), bias - b
    return NeuronFit(kept, weight, None if constant is None else bias, change, (W, b))
