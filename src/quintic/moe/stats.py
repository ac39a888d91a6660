"""How evenly tokens are spread over experts, and over which experts.

With load_e the number of (token, choice) pairs sent to expert e and a uniform target:

    MaxVio = max_e load_e / mean load - 1        (Wang et al., arXiv 2408.15664)

0 is perfect balance, E/k - 1 is complete collapse on k experts. A batch of T tokens routed uniformly *at
random* does not reach 0 either: no method shows a batch MaxVio below its ``sampling_floor``. The *global* MaxVio is
that of a whole validation set, where the floor is small; :class:`RouteRecorder` counts it, and with the tokens' ids

    specialisation = I(expert; token) / (H(expert) - ln k)

the mutual information of choice and token as a part of what it could be: 0, the choice does not depend on which
token it is; 1, the token alone decides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core import DataError
from quintic.moe.router import Router

__all__ = ["ExpertStats", "RouteRecorder", "max_violation", "sampling_floor", "specialisation"]


@dataclass(frozen=True)
class ExpertStats:
    """Load of one layer over one optimizer step."""

    load: list[float]
    """Share of the routed choices per expert; sums to 1."""
    max_violation: float
    """MaxVio."""
    dead_experts: int
    """Experts that no token chose."""
    tokens: int
    """Tokens counted."""
    bias: list[float]
    """The selection bias after the step."""
    entropy: float | None = None
    """Mean entropy of a token's normalised scores in nats, at most ln E; a sample of the tokens. None: no tokens."""
    aux_loss: float | None = None
    """Mean of the layer's weighted auxiliary loss over the forward passes; None without one."""

    @classmethod
    def from_counts(
        cls,
        counts_e: Tensor,
        top_k: int,
        *,
        bias_e: Tensor | None = None,
        entropy: float | None = None,
        aux_loss: float | None = None,
    ) -> ExpertStats:
        """Build from integer counts of shape (experts,)."""
        counts_e = counts_e.cpu()
        total = int(counts_e.sum())
        return cls(
            load=(counts_e.double() / max(total, 1)).tolist(),
            max_violation=max_violation(counts_e),
            dead_experts=int((counts_e == 0).sum()),
            tokens=total // top_k,
            bias=[] if bias_e is None else bias_e.tolist(),
            entropy=entropy,
            aux_loss=aux_loss,
        )


def max_violation(counts_e: Tensor) -> float:
    """MaxVio of counts of shape (experts,); 0 for an empty batch.

    Example:
        >>> max_violation(torch.tensor([4, 2, 2, 0]))
        1.0
    """
    total = int(counts_e.sum())
    return float(counts_e.max()) * counts_e.numel() / total - 1.0 if total else 0.0


def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """Expected MaxVio of a batch routed uniformly at random (normal approximation of the maximum).

    Args:
        tokens: Tokens in the batch.
        num_experts: E.
        top_k: k.

    Example:
        >>> abs(sampling_floor(4096, 64, 6) - 0.12) < 0.01  # 0.120 by simulation
        True
    """
    share = top_k / num_experts
    if tokens == 0 or share >= 1.0:
        return 0.0
    relative = math.sqrt((1.0 - share) / (share * tokens))
    # Blom's approximation of the expected maximum of E standard normals.
    quantile = (num_experts - 0.375) / (num_experts + 0.25)
    return relative * float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64, device="cpu")))


def specialisation(counts_ve: Tensor, top_k: int) -> float:
    """How far a token alone decides its experts: 0 not at all, 1 wholly.

    Args:
        counts_ve: (vocabulary, experts) choices per token id and expert.
        top_k: Choices per token.

    Returns:
        I(expert; token) / (H(expert) - ln k), the information corrected for its bias in small samples
        (Miller and Madow) and kept within [0, 1]; 0 if there is nothing to decide.

    Example:
        >>> specialisation(torch.tensor([[100, 0], [0, 300]]), top_k=1)
        1.0
        >>> specialisation(torch.tensor([[100, 100], [300, 300]]), top_k=1)
        0.0
    """
    joint = counts_ve[counts_ve > 0].double()  # of a large vocabulary most cells are empty, and empty ones add nothing
    total = float(joint.sum())
    if not total:
        return 0.0
    tokens, experts = (counts_ve.sum(axis).double() / total for axis in (1, 0))
    entropy_e = float(torch.special.entr(experts).sum())
    information = float(torch.special.entr(tokens).sum()) + entropy_e - float(torch.special.entr(joint / total).sum())
    cells = [int((part > 0).sum()) for part in (tokens, experts, joint)]
    information -= (cells[2] - cells[0] - cells[1] + 1) / (2.0 * total)
    possible = entropy_e - math.log(top_k)
    return min(1.0, max(0.0, information / possible)) if possible > 1e-9 else 0.0


class RouteRecorder:
    """Counts the choices of every router of a model while it is open, in training mode or not.

    Args:
        model: The model; its routers are found by type.
        vocab_size: Size of the tables of choices per token id; 0 counts the choices only.
        most: Tokens that will be recorded at most, those of other processes included whose tables are added; if it is
            below 2^31, the tables take half of the memory. None if unknown.

    Raises:
        DataError: In a forward pass: no token ids where a vocabulary was given, or not as many as are routed.

    Example:
        >>> from quintic.core.initial import initialize_
        >>> from quintic.moe import MoE
        >>> layer = MoE(16, 8, num_experts=4, top_k=2)
        >>> initialize_(layer, seed=0)
        >>> with RouteRecorder(layer, vocab_size=3) as recorder:
        ...     recorder.tokens = torch.tensor([[0, 1, 2, -1]])  # -1: padding, not counted
        ...     y = layer(torch.randn(1, 4, 16))
        >>> recorder.tables[0].sum().item(), recorder.counts[0].sum().item()
        (6, 6)
    """

    def __init__(self, model: nn.Module, vocab_size: int = 0, *, most: int | None = None) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._vocab_size = vocab_size
        self._handles: list[Any] = []
        self.tokens: Tensor | None = None
        """Token ids of the next forward pass, as many as it routes; a negative one is not counted."""
        experts = [router.bias.shape[0] for router in self._routers]
        dtype = torch.int64 if most is None or most > torch.iinfo(torch.int32).max else torch.int32
        self.tables = [torch.zeros(max(1, vocab_size), e, dtype=dtype, device="cpu") for e in experts]
        """Per layer: (vocabulary, experts) choices; one row without vocabulary."""

    def __enter__(self) -> RouteRecorder:
        for index, router in enumerate(self._routers):
            hook = lambda _router, _inputs, routing, index=index: self._count(index, routing.ids_nk)  # noqa: E731
            self._handles.append(router.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def counts(self) -> list[Tensor]:
        """Per layer: (experts,) choices."""
        return [table.sum(0) for table in self.tables]

    @property
    def max_violation(self) -> list[float]:
        """Per layer: MaxVio of everything recorded, the global one."""
        return [max_violation(counts_e) for counts_e in self.counts]

    @property
    def specialisation(self) -> list[float]:
        """Per layer: how far a token alone decides its experts."""
        found = zip(self.tables, self._routers, strict=True)
        return [specialisation(table_ve, router.top_k) for table_ve, router in found]

    def _count(self, index: int, ids_nk: Tensor) -> None:
        ids_nk = ids_nk.detach().cpu()
        table_ve = self.tables[index]
        if self.tokens is None:
            if self._vocab_size:
                raise DataError("set recorder.tokens to the token ids of a batch before its forward pass")
            token_n = torch.zeros(ids_nk.shape[0], dtype=torch.int64, device="cpu")
        else:
            token_n = self.tokens.flatten().cpu()
            if len(token_n) != len(ids_nk):
                raise DataError(f"recorder.tokens has {len(token_n)} ids, the layer routed {len(ids_nk)} tokens")
        known_n = token_n >= 0
        row_n = token_n[known_n] if self._vocab_size else torch.zeros_like(token_n[known_n])
        cell_m = (row_n.unsqueeze(1) * table_ve.shape[1] + ids_nk[known_n]).flatten()
        table_ve.view(-1).index_add_(0, cell_m, torch.ones_like(cell_m, dtype=table_ve.dtype))
