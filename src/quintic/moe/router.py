"""The router: one score per token and expert, k of them chosen.

Post: https://kexue.fm/archives/10699. The score rho_i = h(x W)_i >= 0 predicts the norm of what expert i
would contribute; keeping the k largest is the best k-term approximation of the dense layer if the experts'
outputs are orthogonal. Selection follows https://kexue.fm/archives/10757 and DeepSeek-V3 (arXiv 2412.19437):

    chosen = argtop_k(rho + b),   gate_i = scale * rho_i   or   scale * rho_i / sum of the chosen rho

with the bias b in the selection only, and optionally among the experts of the best groups only.

Legend: n tokens, d width, e experts, k choices, g groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.core.kernels import fits_kernels, load_kernels
from quintic.core.roles import Constant, Normal, Role, declare
from quintic.moe.router_kernel import fits_fused_route, fused_route
from quintic.moe.score import Score, apply_score, check_score

__all__ = ["Router", "Routing", "argtop", "check_routing", "routed_scaling_factor"]

_FEW_ROWS = 16
_NORM_EPS = 1e-20  # as in DeepSeek-V3; only there for a row of exact zeros


class Routing(NamedTuple):
    """Where each token goes."""

    ids_nk: Tensor
    """(tokens, k) int64, best first; equal scores go to the lower index."""
    gates_nk: Tensor
    """(tokens, k) weights of the chosen experts, float32 (float64 for float64 input)."""
    counts_e: Tensor
    """(experts,) int64: choices per expert, unmasked tokens only."""
    logits_ne: Tensor
    """(tokens, experts) x W, with its graph."""
    scores_ne: Tensor
    """(tokens, experts) selection scores before the bias, with their graph."""
    biased_ne: Tensor
    """(tokens, experts) float32 without graph: what was compared; -inf where a group is excluded."""


class Router(nn.Module):
    """Scores in float32, biased selection, gates from the unbiased scores.

    Args:
        d_model: Width of a token.
        num_experts: E.
        top_k: k, at most E.
        scale: Factor of the gates (:func:`routed_scaling_factor`).
        score: h of the gates: a name of :data:`quintic.moe.score.SCORES` or any non-negative function.
        select: h of the selection; None takes ``score``. A bias step of 0.001 fits scores in (0, 1), so that
            softmax or relu gates balance best with ``select="sigmoid"`` (post 10757).
        normalize_gates: Whether the chosen gates are divided by their sum.
        num_groups: Equal groups of consecutive experts.
        top_groups: Groups that a token may use: those with the largest sum of their two best biased scores.
        offset: Whether logits have a learned constant per expert.

    Raises:
        ConfigError: An unknown score, sizes that cannot be met, or gates that would give no gradient.

    The bias is a float32 buffer whatever the dtype of the model: in bfloat16 a step of 0.001 on a bias of
    5 would vanish. It gets no gradient and no weight decay. The weight starts random, not zero: with equal
    scores every token would go to the same k experts.
    """

    bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        scale: float,
        score: Score = "sigmoid",
        select: Score | None = None,
        normalize_gates: bool = True,
        num_groups: int = 1,
        top_groups: int = 1,
        offset: bool = False,
    ) -> None:
        super().__init__()
        select = score if select is None else select
        check_routing(num_experts, top_k, score, select, normalize_gates, num_groups, top_groups)
        self.top_k = top_k
        self.scale = scale
        self.score = score
        self.select = select
        self.normalize_gates = normalize_gates
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        declare(self, "weight", Role.ROUTER, Normal(1.0 / math.sqrt(d_model)))
        if offset:
            self.offset = nn.Parameter(torch.empty(num_experts))
            declare(self, "offset", Role.VECTOR, Constant(0.0))
        else:
            self.register_parameter("offset", None)
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            # A cast may have rounded it: move the original values instead.
            self.bias = bias.to(self.bias.device)
        if bias.is_meta and not self.bias.is_meta:
            self.bias = torch.zeros_like(self.bias)  # to_empty: whatever the memory held would choose the experts
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.bias = self.bias.float()  # assign=True takes the dtype of what is loaded

    def extra_repr(self) -> str:
        """Sizes and options."""
        experts, width = self.weight.shape
        return f"{width} -> top {self.top_k} of {experts}, score={self.score}, scale={self.scale:.4g}"

    def forward(
        self,
        x_nd: Tensor,
        mask_n: Tensor | None = None,
        *,
        shift: Callable[[Tensor], Tensor] | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x_nd: (tokens, width).
            mask_n: (tokens,) bool; False tokens are routed but not counted.
            shift: From detached selection scores (tokens, experts) to what is added to them besides the bias.
            keep: From the chosen ids to the ids to use: activation checkpointing replays an earlier choice.
        """
        weight_ed, bias_e = self.weight, self.bias
        if shift is None and self._plain and fits_fused_route(x_nd, weight_ed, bias_e):
            return Routing(*fused_route(x_nd, weight_ed, bias_e, self.top_k, self.scale, mask_n, keep))
        dtype = torch.promote_types(x_nd.dtype, torch.float32)
        with torch.autocast(x_nd.device.type, enabled=False):
            logits_ne = x_nd.to(dtype) @ weight_ed.to(dtype).t()
            if self.offset is not None:
                logits_ne = logits_ne + self.offset.to(dtype)
            ids_nk, gates_nk, scores_ne, biased_ne = self.choose(logits_ne, shift=shift, keep=keep)
        # Not bincount, nor ids[mask]: their sizes depend on the data, which breaks the graph of torch.compile.
        one = ids_nk.new_ones(1, 1) if mask_n is None else mask_n.long().unsqueeze(1)
        chosen_m = ids_nk.flatten()
        counts_e = ids_nk.new_zeros(self.weight.shape[0]).index_add_(0, chosen_m, one.expand_as(ids_nk).reshape(-1))
        return Routing(ids_nk, gates_nk, counts_e, logits_ne, scores_ne, biased_ne)

    @property
    def _plain(self) -> bool:
        scores = self.score == self.select == "sigmoid" and self.normalize_gates
        return scores and self.num_groups == self.top_groups and self._parameters["offset"] is None

    def choose(
        self,
        logits_ne: Tensor,
        *,
        shift: Callable[[Tensor], Tensor] | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts and gates of logits, as :meth:`forward` chooses them.

        Args:
            logits_ne: (tokens, experts) in float32 or float64.
            shift: See :meth:`forward`.
            keep: See :meth:`forward`.

        Returns:
            Ids and gates (tokens, k), scores and biased scores (tokens, experts): fields of :class:`Routing`.
        """
        gate_ne = scores_ne = apply_score(self.score, logits_ne, self.top_k)
        if self.select is not self.score:
            scores_ne = apply_score(self.select, logits_ne, self.top_k)
        biased_ne = scores_ne.detach().float() + self.bias
        if shift is not None:
            biased_ne = biased_ne + shift(scores_ne.detach())
        biased_ne = _best_groups(biased_ne, self.num_groups, self.top_groups)
        ids_nk = argtop(biased_ne, self.top_k)
        if keep is not None:
            ids_nk = keep(ids_nk)
        gates_nk = _gates(gate_ne, ids_nk, self.normalize_gates, self.scale)
        return ids_nk, gates_nk, scores_ne, biased_ne


def check_routing(
    num_experts: int,
    top_k: int,
    score: Score,
    select: Score,
    normalize_gates: bool,
    num_groups: int,
    top_groups: int,
) -> None:
    """Raise ConfigError if the options of a :class:`Router` do not fit together."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k must be between 1 and num_experts = {num_experts}, found {top_k}")
    check_score("score", score)
    check_score("select", select)
    if select == "one":
        raise ConfigError('score = "one" cannot select; give select, for example select="sigmoid"')
    if top_k == 1 and normalize_gates:
        raise ConfigError(
            "top_k = 1 with normalised gates leaves the router without gradient; "
            "use top_k >= 2 or normalize_gates=False"
        )
    if "smooth_topk" in (score, select) and top_k == num_experts:
        raise ConfigError("score = smooth_topk needs top_k < num_experts: its scores sum to top_k and each is below 1")
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"num_groups must divide num_experts = {num_experts}, found {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ConfigError(f"top_groups must be between 1 and num_groups = {num_groups}, found {top_groups}")
    if top_k > (reachable := top_groups * (num_experts // num_groups)):
        raise ConfigError(
            f"top_k = {top_k} exceeds the {reachable} experts of {top_groups} groups; raise top_groups or lower top_k"
        )


def argtop(scores_ne: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, largest first, equal scores in order of index on every device.

    ``torch.topk`` leaves ties open. If there is one, a float32 becomes the upper half of an integer that sorts alike,
    and the lower half counts indices down, so that no two are equal. A few rows are quicker sorted.

    Args:
        scores_ne: (rows, n) float32; NaN counts as the largest.
        k: At most n.

    Example:
        >>> argtop(torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0, -0.0, -1.0, 0.0]]), 3)
        tensor([[1, 3, 0],
                [0, 1, 3]])
    """
    assert scores_ne.dtype == torch.float32
    last = scores_ne.shape[-1] - 1
    if not torch.compiler.is_compiling():
        if scores_ne.shape[0] <= _FEW_ROWS:
            return scores_ne.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        if fits_kernels(scores_ne) and (kernels := load_kernels()) is not None:
            ids_nk = scores_ne.new_empty((len(scores_ne), k), dtype=torch.int64)
            kernels.call("top", *scores_ne.shape, k, scores_ne.contiguous(), ids_nk)
            return ids_nk
        if scores_ne.device.type == "cpu":  # elsewhere the question would wait for the device
            best, indices = scores_ne.topk(min(k, last) + 1)
            if torch.all(best[:, :-1] > best[:, 1:]):
                return indices[:, :k].contiguous()
    # + 0.0 turns -0.0 into 0.0; a NaN may have a sign, too: that of inf - inf is negative.
    bits = torch.where(scores_ne.isnan(), torch.nan, scores_ne + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards by their bits
    index = torch.arange(last, -1, -1, device=scores_ne.device)
    key = (ordered.to(torch.int64) << 32) | index
    return last - (key.topk(k, dim=-1).values & 0xFFFFFFFF)


def _best_groups(biased_ne: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """-inf for the experts outside of the groups with the largest sum of their two best scores."""
    if top_groups == num_groups:
        return biased_ne
    groups_nge = biased_ne.unflatten(-1, (num_groups, -1))
    best_ng = groups_nge.topk(min(2, groups_nge.shape[-1]), dim=-1).values.sum(-1)
    open_ng = torch.zeros_like(best_ng, dtype=torch.bool).scatter_(1, argtop(best_ng, top_groups), True)
    return groups_nge.masked_fill(~open_ng.unsqueeze(-1), -math.inf).flatten(1)


def _gates(scores_ne: Tensor, ids_nk: Tensor, normalize: bool, scale: float = 1.0) -> Tensor:
    if not normalize:
        return scores_ne.gather(1, ids_nk) * scale
    if not torch.is_grad_enabled():
        return _normalised(scores_ne, ids_nk)[0] * scale
    gates_nk: Tensor = _NormalisedGates.apply(scores_ne, ids_nk, scale)  # type: ignore[assignment]
    return gates_nk


def _normalised(scores_ne: Tensor, ids_nk: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen scores over their sum, and that sum."""
    chosen_nk = scores_ne.gather(1, ids_nk)
    total_n1 = chosen_nk.sum(-1, keepdim=True) + _NORM_EPS
    return chosen_nk / total_n1, total_n1


class _NormalisedGates(torch.autograd.Function):
    """p = scale s / sum of the chosen s, and back ds = (scale dp - <dp, p>) / sum."""

    @staticmethod
    def forward(ctx: Any, scores_ne: Tensor, ids_nk: Tensor, scale: float) -> Tensor:
        gates_nk, total_n1 = _normalised(scores_ne, ids_nk)
        gates_nk *= scale
        ctx.save_for_backward(gates_nk, total_n1, ids_nk)
        ctx.shape, ctx.scale = scores_ne.shape, scale
        return gates_nk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gates_nk, total_n1, ids_nk = ctx.saved_tensors
        (dgates_nk,) = grad_outputs
        along_n1 = (dgates_nk * gates_nk).sum(-1, keepdim=True)
        dchosen_nk = (ctx.scale * dgates_nk - along_n1) / total_n1
        return dgates_nk.new_zeros(ctx.shape).scatter_(1, ids_nk, dchosen_nk), None, None


@functools.lru_cache
def routed_scaling_factor(
    num_experts: int,
    top_k: int,
    num_shared: int = 1,
    *,
    score: Score = "sigmoid",
    select: Score | None = None,
    normalize_gates: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    samples: int = 8192,
) -> float:
    """The factor that gives routed and shared experts equal RMS at initialisation.

    lambda = E[sqrt(s) / sqrt(sum of the chosen gates squared)] for unit-norm orthogonal experts and N(0, 1)
    logits (https://kexue.fm/archives/10945), by a fixed simulation of the router.

    Args:
        num_experts: Routed experts E.
        top_k: Routed choices k.
        num_shared: Shared experts s; those fused in one feed-forward count once.
        score: h of the gates.
        select: h of the selection; None takes ``score``.
        normalize_gates: Whether the chosen gates are divided by their sum.
        num_groups: Groups of experts.
        top_groups: Groups that a token may use.
        samples: Simulated tokens; 8192 gives about three digits.

    Example:
        Moonlight's 2.446; 16 of DeepSeek-V2; 2.83 for DeepSeek-V3's shape (it uses 2.5).

        >>> f"{routed_scaling_factor(64, 6):.3f}"
        '2.446'
        >>> f"{routed_scaling_factor(160, 6, 2, score='softmax', normalize_gates=False):.1f}"
        '16.0'
        >>> f"{routed_scaling_factor(256, 8):.2f}"
        '2.83'
    """
    normal = Stream(0, "routed scaling factor").normal(0, samples * num_experts)
    logits_ne = torch.from_numpy(normal).view(samples, num_experts)
    scores_ne = apply_score(score, logits_ne, top_k)
    select_ne = scores_ne if select is None else apply_score(select, logits_ne, top_k)
    ids_nk = argtop(_best_groups(select_ne.float(), num_groups, top_groups), top_k)
    gates_nk = _gates(scores_ne, ids_nk, normalize_gates)
    norm_n = gates_nk.norm(dim=1)
    return math.sqrt(num_shared) * float(norm_n[norm_n > 0].reciprocal().mean())  # relu may leave a token without gates
