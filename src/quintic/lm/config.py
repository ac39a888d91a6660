"""Shape of the language model: DeepSeek-V3's architecture in Moonlight's configuration.

The defaults are the ``tiny`` preset. Presets are TOML files in ``assets/presets/lm``; one preset name sets
every number, and any of them can be overridden by name.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from quintic.assets import preset_text
from quintic.core import ConfigError, suggest
from quintic.moe.balance import RULES, Balance, LossFree, NoBalance

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
    balance: str = "loss-free"
    """How the expert load is balanced: loss-free (a selection bias) or none."""
    balance_rule: str = "floored-rms"
    """Step of the selection bias: sign, sgd, relative, rms or floored-rms."""
    balance_rate: float = 0.01
    """Size of that step."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size", "context", "d_model", "num_layers", "num_heads", "qk_nope_dim", "qk_rope_dim",
            "v_dim", "kv_rank", "d_ff", "d_expert", "num_experts", "top_k",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"lm.{name} must be at least 1, found {getattr(self, name)}")
        for name in ("num_shared", "q_rank", "num_dense_layers", "route_scale", "balance_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"lm.{name} must be at least 0, found {getattr(self, name)}")
        for name in ("qk_nope_dim", "qk_rope_dim", "kv_rank"):
            if getattr(self, name) % 2:
                raise ConfigError(f"lm.{name} must be even (positions turn pairs), found {getattr(self, name)}")
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"lm.num_dense_layers = {self.num_dense_layers} exceeds lm.num_layers = {self.num_layers}"
            )
        if self.num_dense_layers < self.num_layers and not 2 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"lm.top_k must be between 2 and lm.num_experts = {self.num_experts}, found {self.top_k} "
                "(one normalised choice would leave the router without gradient)"
            )
        if self.balance not in BALANCES:
            raise ConfigError(f"lm.balance = {self.balance!r} is unknown{suggest(self.balance, BALANCES)}")
        if self.balance_rule not in RULES:
            raise ConfigError(f"lm.balance_rule = {self.balance_rule!r} is unknown{suggest(self.balance_rule, RULES)}")

    @classmethod
    def preset(cls, size: str) -> LMConfig:
        """The model section of a preset, e.g. ``laptop``.

        Raises:
            ConfigError: No preset has that name.
        """
        return cls(**tomllib.loads(preset_text("lm", size)).get("lm", {}))

    def make_balance(self) -> Balance:
        """The balancer that the fields describe."""
        return NoBalance() if self.balance == "none" else LossFree(self.balance_rule, self.balance_rate)
