"""Shape of the language model: DeepSeek-V3's architecture in Moonlight's configuration.

The defaults are the ``tiny`` preset. Presets are TOML files in ``assets/presets/lm``; one preset name sets
every number, and any of them can be overridden by name.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from typing import Any

from quintic.assets import preset_text
from quintic.core import ConfigError, suggest
from quintic.core.settings import check_least, check_names, check_types
from quintic.moe.auxiliary import AuxLoss, ZLoss
from quintic.moe.balance import RULES, Balance, Combination, LossFree
from quintic.moe.layer import NORMS
from quintic.moe.router import check_routing

__all__ = ["LMConfig"]

BALANCES = ("loss-free", "none")


@dataclass(frozen=True)
class LMConfig:
    """Sizes of a :class:`quintic.lm.LanguageModel`.

    Raises:
        ConfigError: A value is out of range; the message names the field.

    Example:
        >>> LMConfig.preset("laptop").num_experts >= 8
        True
    """

    vocab_size: int = 264
    """Rows of the embedding and of the head; set from the tokenizer in a training run."""
    context: int = 64
    """Tokens per training window, and the longest distance attention can look back."""
    d_model: int = 64
    """Width of the residual stream."""
    num_layers: int = 3
    """Blocks."""
    num_dense_layers: int = 1
    """First blocks that have a dense feed-forward instead of experts."""
    num_heads: int = 2
    """Attention heads."""
    qk_nope_dim: int = 16
    """Width per head of queries and keys without position."""
    qk_rope_dim: int = 16
    """Width per head of queries and of the one shared key that carry the position."""
    v_dim: int = 32
    """Width per head of values."""
    kv_rank: int = 32
    """Width of the compressed latent of keys and values."""
    q_rank: int = 0
    """Width of the compressed latent of queries; 0 projects queries directly, as Moonlight does."""
    d_ff: int = 128
    """Hidden width of the dense feed-forward."""
    d_expert: int = 32
    """Hidden width of one expert."""
    num_experts: int = 8
    """Routed experts per layer."""
    top_k: int = 2
    """Routed experts per token."""
    num_shared: int = 1
    """Experts that every token visits."""
    route_scale: float = 0.0
    """Factor of the routed branch; 0 computes the one that matches the shared branch at initialisation."""
    score: str = "sigmoid"
    """How the router's logits become scores: softmax, sigmoid, relu or smooth_topk."""
    select: str = ""
    """The same for the choice of experts only; empty takes ``score``."""
    normalize_gates: bool = True
    """Whether the gates of the chosen experts are divided by their sum."""
    normalize_experts: str = ""
    """Whether an expert's output is divided by its norm: l2, rms or empty for neither."""
    num_groups: int = 1
    """Equal groups of consecutive experts."""
    top_groups: int = 1
    """Groups that a token may use."""
    dense: bool = False
    """The baseline of equal active compute: dense feed-forwards of width (top_k + num_shared) * d_expert instead of
    experts."""
    balance: str = "loss-free"
    """How the expert load is balanced: loss-free (a selection bias) or none."""
    balance_rule: str = "floored-rms"
    """Step of the selection bias: sign, sgd, relative, rms, floored-rms or quantile."""
    balance_rate: float = 0.0
    """Size of that step; 0 takes the rule's own."""
    balance_rest: float = 0.0
    """Part at the end of the training in which the bias rests."""
    aux_weight: float = 0.0
    """Weight of an auxiliary loss of the load, beside the bias or instead of it; 0 for none."""
    aux_over: str = "batch"
    """What that loss balances: every batch, every sequence, or the global batch."""
    z_weight: float = 0.0
    """Weight of the router's z-loss; 0 for none."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    qk_clip: float = 0.0
    """Attention logits above this make a training step shrink the queries and keys of their head; 0 is never."""
    checkpoint: bool = False
    """Whether training keeps the inputs of blocks alone and computes the rest again: less memory, a third more work."""
    compile: bool = False
    """Whether training compiles the blocks with torch.compile: half a minute at the start, then faster steps."""

    def __post_init__(self) -> None:
        check_types("lm", self)
        check_names("lm", self, {"balance": BALANCES, "balance_rule": RULES})
        check_least("lm", self, dict.fromkeys((
            "vocab_size", "context", "d_model", "num_layers", "num_heads", "qk_nope_dim", "qk_rope_dim",
            "v_dim", "kv_rank", "d_ff", "d_expert", "num_experts", "top_k", "num_groups", "top_groups",
        ), 1))  # fmt: skip
        check_least("lm", self, dict.fromkeys((
            "num_shared", "q_rank", "num_dense_layers", "route_scale", "balance_rate", "balance_rest", "aux_weight",
            "z_weight", "qk_clip", "norm_eps",
        ), 0))  # fmt: skip
        if not 0 < self.rope_theta < math.inf:
            raise ConfigError(f"lm.rope_theta must be above 0 and finite, found {self.rope_theta}")
        for name in ("qk_nope_dim", "qk_rope_dim", "kv_rank"):
            if getattr(self, name) % 2:
                raise ConfigError(f"lm.{name} must be even (positions turn pairs), found {getattr(self, name)}")
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"lm.num_dense_layers = {self.num_dense_layers} exceeds lm.num_layers = {self.num_layers}"
            )
        if self.has_experts:
            try:
                check_routing(self.num_experts, self.top_k, **self.routing)
            except ConfigError as error:
                raise ConfigError(f"lm.{error}") from None
            if self.normalize_experts not in ("", *NORMS):
                raise ConfigError(
                    f"lm.normalize_experts must be l2, rms or empty, found {self.normalize_experts!r}"
                    f"{suggest(self.normalize_experts, NORMS)}"
                )
        try:
            self.make_balance()
        except ConfigError as error:
            raise ConfigError(f"lm.balance... or lm.aux...: {error}") from None

    @classmethod
    def preset(cls, size: str) -> LMConfig:
        """The model section of a preset, e.g. ``laptop``.

        Raises:
            ConfigError: No preset has that name.
        """
        return cls(**tomllib.loads(preset_text("lm", size)).get("lm", {}))

    @property
    def has_experts(self) -> bool:
        """Whether any block has experts."""
        return not self.dense and self.num_dense_layers < self.num_layers

    @property
    def routing(self) -> dict[str, Any]:
        """Options that :class:`quintic.moe.MoE` and the routed scale have in common."""
        return {
            "score": self.score,
            "select": self.select or self.score,
            "normalize_gates": self.normalize_gates,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
        }

    def make_balance(self) -> Balance:
        """The balancer that the fields describe."""
        parts: list[Balance] = []
        if self.balance == "loss-free":
            parts.append(LossFree(self.balance_rule, self.balance_rate or None, rest=self.balance_rest))
        if self.aux_weight:
            parts.append(AuxLoss(self.aux_weight, over=self.aux_over))
        if self.z_weight:
            parts.append(ZLoss(self.z_weight))
        return parts[0] if len(parts) == 1 else Combination(tuple(parts))
