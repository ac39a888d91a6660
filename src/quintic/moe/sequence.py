"""Balance within a sequence without a loss: moving quantile balancing.

Post: https://kexue.fm/archives/11760 (constants from a digest of it). Along a sequence, keep the histogram of every
expert's scores so far, with older tokens fading by a factor per token, read the cut that the share k/n of it exceeds,
and select by the score less a part of the cut:

    chosen_t = argtop_k(rho_t + b - strength * quantile_t(1 - k/n))

An expert whose scores are high in this sequence must then be higher still to be chosen. Causal: the cut at a token
reads this token and earlier ones only. Selection alone changes, as with the bias.

Legend: s sequences, t tokens of a sequence, e experts, b bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.moe.balance import Balance

__all__ = ["MovingQuantile", "moving_quantile"]

_BINS = 100


def moving_quantile(
    scores_ste: Tensor,
    share: float,
    *,
    decay: float = 0.99,
    state_seb: Tensor | None = None,
    mask_st: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cut that a share of each expert's fading history exceeds, at every token.

    Args:
        scores_ste: (sequences, tokens, experts) scores in [0, 1], as a sigmoid or softmax gives.
        share: Part of the history above the cut, in (0, 1).
        decay: What remains of a token's weight one token later.
        state_seb: Histograms after the tokens before these, to go on with a sequence; None starts one.
        mask_st: (sequences, tokens) bool; False tokens leave the history as it is. None counts every token.

    Returns:
        Cuts (sequences, tokens, experts), and the state after the last token.
    """
    sequences, tokens, experts = scores_ste.shape
    if state_seb is None:
        state_seb = scores_ste.new_zeros(sequences, experts, _BINS)
    else:
        state_seb = state_seb.clone()
    bin_ste = (scores_ste * _BINS).long().clamp(0, _BINS - 1)
    mask_st = torch.ones_like(bin_ste[..., 0], dtype=torch.bool) if mask_st is None else mask_st
    one_st, fade_st = mask_st.to(scores_ste.dtype), torch.where(mask_st, decay, 1.0).to(scores_ste.dtype)
    cut_ste = torch.empty_like(scores_ste)
    for t in range(tokens):
        state_seb *= fade_st[:, t, None, None]
        state_seb.scatter_add_(2, bin_ste[:, t].unsqueeze(2), one_st[:, t, None, None].expand(-1, experts, 1))
        below_seb = state_seb.cumsum(2)
        wanted_se1 = (1.0 - share) * below_seb[..., -1:]
        at_se1 = (below_seb < wanted_se1).sum(2, keepdim=True).clamp(max=_BINS - 1)
        here_se1 = state_seb.gather(2, at_se1)
        inside_se1 = 1.0 - (below_seb.gather(2, at_se1) - wanted_se1) / here_se1.clamp(min=1e-30)
        cut_ste[:, t] = ((at_se1 + inside_se1.clamp(0.0, 1.0)) / _BINS).squeeze(2)
    return cut_ste, state_seb


@dataclass(frozen=True)
class MovingQuantile(Balance):
    """Balance every sequence, beside a :class:`~quintic.moe.LossFree` that balances them all.

    Args:
        strength: Part of the cut that is subtracted; the post finds 0.3 nearly free and 1 costly.
        decay: What remains of a token's weight one token later.

    Raises:
        ConfigError: A value out of range; the layer's tokens have no time axis.

    A loop over time, slow on long sequences. A layer that is fed token by token, as in generation with a cache,
    starts a new history every time: generate without a cache, or keep the state of :func:`moving_quantile`.
    """

    strength: float = 0.3
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"the strength of MovingQuantile must be between 0 and 1, found {self.strength}")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"the decay of MovingQuantile must be in (0, 1], found {self.decay}")

    def shift(self, rows: Sequence[int], top_k: int, mask_n: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """Minus a part of the cut of each token."""
        if len(rows) < 2:
            raise ConfigError("MovingQuantile needs tokens of shape (batch, time, width); this batch has no time axis")
        sequences, tokens = math.prod(rows[:-1]), rows[-1]

        def of_scores(scores_ne: Tensor) -> Tensor:
            experts = scores_ne.shape[1]
            cut_ste, _ = moving_quantile(
                scores_ne.detach().view(sequences, tokens, experts), top_k / experts, decay=self.decay,
                mask_st=None if mask_n is None else mask_n.view(sequences, tokens),
            )  # fmt: skip
            return -self.strength * cut_ste.view_as(scores_ne)

        return of_scores
