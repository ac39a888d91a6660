"""The mixture-of-experts layer: shared experts for every token, k routed experts for each.

    y = shared(x) + sum over i in argtop_k(rho + b) of rho_i e_i(x)

Posts: https://kexue.fm/archives/10699 (why top-k by norm; e_i may be an expert's output over its norm),
/10757 (the bias b), /10945 (shared experts and the routed scale). In a training loop of your own, call
``balance_step(model)`` after ``optimizer.step()``, and add ``aux_loss(model)`` to the loss if the balance has one.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintic.core import ConfigError, suggest
from quintic.core.hooks import added
from quintic.core.roles import Normal, declared_roles
from quintic.moe.balance import Balance, LossFree
from quintic.moe.experts import Experts
from quintic.moe.feedforward import FeedForward
from quintic.moe.meter import Meter
from quintic.moe.replay import KeptRouting
from quintic.moe.routed import unit_rms
from quintic.moe.router import Router, routed_scaling_factor
from quintic.moe.score import Score
from quintic.moe.stats import ExpertStats
from quintic.moe.update import collect_aux_loss, update_layers

__all__ = ["NORMS", "MoE", "aux_loss", "balance_step"]

NORMS = ("l2", "rms")

_FEW_EXPERTS = 16  # up to here softmax scores bear the step of a bias that was made for a sigmoid


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer; the defaults are those of DeepSeek-V3 and Moonlight.

    Args:
        d_model: Width of a token.
        d_expert: Hidden width of one expert.
        num_experts: Routed experts.
        top_k: Routed experts per token.
        num_shared: Shared experts, fused in one feed-forward of width ``num_shared * d_expert``; 0 for none.
        score: h of rho = h(x W): ``softmax``, ``sigmoid``, ``relu``, ``smooth_topk``, or any function from logits
            (tokens, experts) to non-negative scores.
        select: Another h for the selection only; None takes ``score``. With ``score="softmax"`` and a balance by bias
            take ``"sigmoid"``: rates of :class:`~quintic.moe.LossFree` are in units of this score.
        normalize_gates: Whether the chosen gates are divided by their sum.
        normalize_experts: ``None``: e_i is the expert's output v_i. ``"rms"``: v_i / RMS(v_i), RMSNorm with unit
            gain. ``"l2"``: v_i / ||v_i||, sqrt(d_model) times smaller. Shared experts are treated alike.
        num_groups: Equal groups of consecutive experts.
        top_groups: Groups that a token may use: those with the largest sum of their two best scores.
        route_scale: Factor of the routed branch; 0 computes the one that gives both branches equal RMS at
            initialisation (:func:`quintic.moe.router.routed_scaling_factor`).
        router_offset: Whether the router's logits have a learned constant per expert.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        gated: Whether an expert is gated (SwiGLU and its kin) or plain.
        balance: How the load is balanced; :class:`quintic.moe.LossFree` if not given.
        out_scale: Factor of the initial scale of the output.
        initialize: Whether to draw the weights from torch's default generator, which ``torch.manual_seed`` governs, as
            ``torch.nn`` layers do. False leaves them to :func:`quintic.core.initial.initialize_`, which takes a seed,
            or to a checkpoint.

    Raises:
        ConfigError: A size or an option is out of range; the message names it.

    Example:
        A layer in a block and a loop of your own. The roles of its parameters are declared, so that ``Muon(model)``
        takes the matrices; any optimizer of ``torch.optim`` works too.

        >>> from quintic.optim import Muon
        >>> class Block(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        ...         self.moe = MoE(width, 8, num_experts=4, top_k=2)
        ...     def forward(self, x, mask=None):
        ...         x = x + self.attention(x, x, x, need_weights=False)[0]
        ...         return x + self.moe(x, mask)  # mask: (3, 5) bool, False for padding
        >>> model = Block(16)
        >>> optimizer = Muon(model, lr=1e-3)
        >>> for _ in range(2):
        ...     loss = model(torch.ones(3, 5, 16)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     stats = balance_step(model)
        >>> model.moe.stats.tokens, round(sum(model.moe.stats.load), 6)
        (15, 1.0)
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared: int = 1,
        score: Score = "sigmoid",
        select: Score | None = None,
        normalize_gates: bool = True,
        normalize_experts: str | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        route_scale: float = 0.0,
        router_offset: bool = False,
        activation: str = "silu",
        gated: bool = True,
        balance: Balance | None = None,
        out_scale: float = 1.0,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_expert", d_expert), ("num_experts", num_experts)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if num_shared < 0:
            raise ConfigError(f"num_shared must be at least 0, found {num_shared}")
        if route_scale < 0.0:
            raise ConfigError(f"route_scale must be at least 0 (0 computes it), found {route_scale}")
        if balance is not None and not isinstance(balance, Balance):
            raise ConfigError(
                f"balance must be a balancer such as LossFree('sign'), AuxLoss(0.01) or NoBalance(), found {balance!r}"
            )
        if normalize_experts is not None and normalize_experts not in NORMS:
            raise ConfigError(
                f"normalize_experts must be None, 'l2' or 'rms', found {normalize_experts!r}"
                f"{suggest(normalize_experts, NORMS)}"
            )
        self.router = Router(
            d_model, num_experts, top_k, scale=1.0, score=score, select=select, normalize_gates=normalize_gates,
            num_groups=num_groups, top_groups=top_groups, offset=router_offset,
        )  # fmt: skip
        self.router.scale = route_scale or routed_scaling_factor(
            num_experts, top_k, score=score, select=select, normalize_gates=normalize_gates, num_groups=num_groups,
            top_groups=top_groups,
        )  # fmt: skip
        self.normalize_experts = normalize_experts
        # A normalised output forgets the scale of its weights, and l2 is rms but for a constant.
        self.gain = 1.0 if normalize_experts is None else out_scale
        if normalize_experts == "l2":
            self.gain /= math.sqrt(d_model)
        self.experts = Experts(
            d_model, d_expert, num_experts, activation=activation, gated=gated,
            normalize=normalize_experts is not None, out_scale=out_scale,
        )  # fmt: skip
        self.shared = None
        if num_shared:
            width = num_shared * d_expert
            self.shared = FeedForward(d_model, width, activation=activation, gated=gated, out_scale=out_scale)
        self.balance = LossFree() if balance is None else balance
        self.balance.check(num_experts, top_k)
        many = num_experts > _FEW_EXPERTS
        if many and self.router.select == "softmax" and self.balance.rate_is_for_sigmoid:
            warnings.warn(
                f"the default rate of {self.balance} is for scores like those of a sigmoid; softmax scores of "
                f'{num_experts} experts are far smaller, and the bias would overshoot: give select="sigmoid", which '
                "chooses the same experts where the bias is 0, or a rate",
                stacklevel=2,
            )
        self.meter = Meter(num_experts, top_k, self.balance)
        self.kept = KeptRouting()
        self.register_load_state_dict_post_hook(_counters_follow)
        self.stats: ExpertStats | None = None
        if initialize:
            self.reset_parameters()

    @property
    def counts(self) -> Tensor:
        """(experts,) choices per expert since the last optimizer step."""
        return self.meter.counts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights again, from torch's default generator; the bias and the counters start from 0."""
        roles = declared_roles(self)
        for name, parameter in self.named_parameters():
            init = roles[name].init
            if isinstance(init, Normal):
                parameter.normal_(0.0, init.std)
            elif init is not None:
                parameter.fill_(init.value)
        self.router.bias.zero_()
        self.meter.reset()
        self.kept.clear()

    def extra_repr(self) -> str:
        """Options that no submodule shows."""
        return f"normalize_experts={self.normalize_experts}, balance={self.balance}"

    def forward(self, x: Tensor, mask: Tensor | None = None, *, plus: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., width). For what is balanced along a sequence, the axis before the last is the sequence.
            mask: (...) bool; False marks padding, which is computed but not counted as load.
            plus: (..., width), added to the result: a residual stream costs no pass over memory of its own.

        Returns:
            (..., width).

        Raises:
            ConfigError: The width or the mask does not fit.
        """
        rows = x.shape[:-1]
        if x.shape[-1] != self.router.weight.shape[1]:
            raise ConfigError(f"x has width {x.shape[-1]}, the layer has d_model = {self.router.weight.shape[1]}")
        if mask is not None and mask.shape != rows:
            raise ConfigError(f"mask has shape {tuple(mask.shape)}; expected {tuple(rows)}, one bool per token of x")
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigError(f"mask has dtype {mask.dtype}; expected torch.bool, False for padding: mask.bool()")
        x_nd = x.reshape(-1, x.shape[-1])
        mask_n = None if mask is None else mask.reshape(-1)
        shift = self.balance.shift(rows, self.router.top_k, mask_n)
        routing = self.router(x_nd, mask_n, shift=shift, keep=self.kept if self.training else None)
        if self.training:
            self.meter.observe(self.balance, routing, mask_n, rows)
        gates_nk = routing.gates_nk if self.gain == 1.0 else routing.gates_nk * self.gain
        # A sum is never a view of something else in the end: fully_shard asks that of the blocks that it wraps.
        plus_nd = None if plus is None or self.shared is None else plus.reshape(x_nd.shape)
        y = added(plus_nd, self.experts, x_nd, routing.ids_nk, gates_nk).view(x.shape)
        if self.shared is None:
            return y if plus is None else plus + y
        if self.normalize_experts is None:
            return added(y, self.shared, x)
        return y + unit_rms(self.shared(x)) * self.gain


def _counters_follow(layer: MoE, incompatible_keys: object) -> None:
    """A load with assign=True brings what is saved to where it was read, and counters are not saved."""
    layer.meter.follow(layer.router.bias.device)


@torch.no_grad()
def balance_step(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, progress: float | None = None
) -> list[ExpertStats]:
    """Update every balancer of a model from the load since the last call, and reset the counters.

    Call it once per optimizer step, after the batch that used the old bias. Where an optimizer skips a step, as on a
    gradient that is not finite, call it too: the load was real. Without a call its counts add to those of the next.

    Args:
        model: Its MoE layers are found by type.
        group: Processes whose counts are added up; None is all, if there is a process group.
        progress: Part of the training that is done, for balancers with a schedule.

    Returns:
        One :class:`ExpertStats` per MoE layer, in module order; also kept as ``layer.stats``.
    """
    return update_layers([layer for layer in model.modules() if isinstance(layer, MoE)], group, progress)


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the weighted auxiliary losses of the forward passes since the last call; 0 if there are none.

    Call it once per forward pass and add it to the loss before ``backward``.
    """
    return collect_aux_loss([layer for layer in model.modules() if isinstance(layer, MoE)])
