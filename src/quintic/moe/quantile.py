"""Quantile balancing: the bias that would have balanced the batch, read from a histogram.

Posts: https://kexue.fm/archives/11619 and /11626. Choosing k experts per token and k/n of the tokens per expert
with the largest total score is a linear program; its dual alternates between a cutoff alpha_i of every token and an
offset beta_j of every expert. One half-step per batch, warm-started from the bias in use (b = -beta), is

    d_ij = rho_ij + b_j - alpha_i,      b_j -= the (1 - k Q_j) quantile of d_.j over the tokens

d is the margin by which token i chooses expert j, and the quantile is the cut that would let in the share k Q_j.

The dual allows alpha_i anywhere between the k-th and the (k + 1)-th largest biased score. The posts take the
(k + 1)-th; then the margin of that expert is exactly 0 for every token, and this point mass is a dead zone around
which the iteration ratchets. Here alpha_i is the **midpoint**, which has no point mass.

The quantile is read from a histogram of integers, so that micro-batches and ranks add up exactly. Its bins are edges
x = u^3 of a uniform grid of u in [-1, 1]: finest at margin 0, where the quantile is once the load is balanced, so
that the bins do not limit how close it gets. A cut beyond [-1, 1] is approached in steps of 1.

Legend: n tokens, e experts, b bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BINS", "margin_histogram", "quantile_cut"]

BINS = 256


def margin_histogram(biased_ne: Tensor, top_k: int, mask_n: Tensor | None = None) -> Tensor:
    """How many tokens have which margin, per expert.

    Args:
        biased_ne: (tokens, experts) what the selection sorted, score + bias; -inf for what it may not choose.
        top_k: k, the choices per token.
        mask_n: (tokens,) bool; False tokens are left out.

    Returns:
        (experts, BINS) int64.
    """
    experts = biased_ne.shape[1]
    histogram = torch.zeros(experts * BINS, dtype=torch.int64, device=biased_ne.device)
    if top_k < experts:  # else everybody is chosen, and no bias changes that
        best = biased_ne.topk(top_k + 1, dim=1).values
        # A token with no more than k eligible experts has no runner-up: it would choose them at any bias.
        low = torch.where(best[:, top_k].isfinite(), best[:, top_k], best[:, top_k - 1])
        margin_ne = biased_ne - 0.5 * (best[:, top_k - 1] + low).unsqueeze(1)
        margin_ne = margin_ne.nan_to_num(nan=-1.0).clamp_(-1.0, 1.0)
        grid_ne = margin_ne.sign() * margin_ne.abs().pow_(1.0 / 3.0)
        bin_ne = ((grid_ne + 1.0) * (BINS / 2)).long().clamp_(max=BINS - 1)
        bin_ne += BINS * torch.arange(experts, device=biased_ne.device)
        one = torch.ones_like(bin_ne) if mask_n is None else mask_n.long().unsqueeze(1).expand_as(bin_ne)
        histogram.scatter_add_(0, bin_ne.flatten(), one.flatten())
    return histogram.view(experts, BINS)


def quantile_cut(histogram_eb: Tensor, share_e: Tensor) -> Tensor:
    """The margin that a given share of the tokens exceeds.

    Args:
        histogram_eb: (experts, BINS) integers, sums of :func:`margin_histogram`.
        share_e: (experts,) float64, the share of the tokens above the cut, in (0, 1].

    Returns:
        (experts,) float64 in [-1, 1], interpolated within a bin; 0 for an expert without tokens.

    Example:
        >>> scores = torch.linspace(-0.5, 0.5, 1001).unsqueeze(1).repeat(1, 2)
        >>> scores[:, 1] = 0.0  # of two experts, the first wins half of the time
        >>> quantile_cut(margin_histogram(scores, top_k=1), torch.tensor([0.5, 0.5])).abs().max() < 1e-3
        tensor(True)
    """
    above_eb = histogram_eb.double().flip(1).cumsum(1).flip(1)  # tokens in this bin or a higher one
    total_e = above_eb[:, 0]
    wanted_e = share_e.to(above_eb) * total_e
    at_e = (above_eb >= wanted_e.unsqueeze(1)).sum(1).sub(1).clamp(min=0)  # the bin that holds the cut
    here_e = histogram_eb.double().gather(1, at_e.unsqueeze(1)).squeeze(1)
    inside_e = above_eb.gather(1, at_e.unsqueeze(1)).squeeze(1) - wanted_e
    low_e, high_e = (((at_e + side) * (2.0 / BINS) - 1.0) ** 3 for side in (0, 1))
    cut_e = low_e + (high_e - low_e) * (inside_e / here_e.clamp(min=1.0)).clamp(0.0, 1.0)
    return torch.where(total_e > 0, cut_e, torch.zeros_like(cut_e))
