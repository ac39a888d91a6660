"""Training a language model: windows of tokens in, cross-entropy and bits per byte out, samples of text.

Satisfies the engine's task protocol. Bits per byte = nats / (ln 2 * bytes of text): unlike the loss per token
it does not depend on the tokenizer. On validation and test it is exact: the nats of every token of the
split over the bytes of the split's text. On a training step the bytes are the training split's mean per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from quintic.core.files import atomic_write
from quintic.core.kernels import kernels_in_use
from quintic.core.loss import Loss
from quintic.core.ranks import ALONE, Ranks
from quintic.data.tokenizer import Tokenizer
from quintic.data.tokens import Split, TokenData, document_ids, num_windows, windows
from quintic.lm.config import LMConfig
from quintic.lm.decode import generate
from quintic.lm.mla import LatentAttention
from quintic.lm.model import LanguageModel
from quintic.moe.layer import aux_loss, balance_step
from quintic.moe.router import routed_scaling_factor
from quintic.moe.stats import RouteRecorder, sampling_floor

__all__ = ["LanguageModelTask", "derived_fields"]

_EVAL_TOKENS = 8192
_SAMPLE_TOKENS = 200
_LOOKED_AT = 1 << 20  # tokens at a time, where all of a split are


def derived_fields(config: LMConfig, tokenizer: Tokenizer) -> dict[str, tuple[Any, str]]:
    """Numbers that follow from others: {field: (value, where it comes from)}.

    Args:
        config: With ``route_scale`` 0 if it is to be computed.
        tokenizer: Sets the vocabulary.
    """
    size = tokenizer.vocab_size
    why = f"tokenizer has {size} tokens, rounded up to a multiple of 8"
    found: dict[str, tuple[Any, str]] = {"vocab_size": (-(-size // 8) * 8, why)}
    if config.route_scale == 0.0 and config.has_experts:
        scale = round(routed_scaling_factor(config.num_experts, config.top_k, **config.routing), 3)
        found["route_scale"] = (
            scale,
            f"equal RMS of routed and shared branch, top {config.top_k} of {config.num_experts}",
        )
    return found


class LanguageModelTask:
    """A language model and the tokens it learns from.

    Args:
        config: Resolved sizes; ``vocab_size`` covers the tokenizer.
        data: Tokens of the three splits.
        cross_documents: Whether attention may look into an earlier document of the same window.
    """

    name = "lm"
    samples_whole = False

    def __init__(self, config: LMConfig, data: TokenData, *, cross_documents: bool) -> None:
        assert config.vocab_size >= data.tokenizer.vocab_size
        self.config = config
        self.data = data
        self.cross_documents = cross_documents
        self.num_examples = num_windows(data.train, config.context)
        self.fingerprint = f"{data.fingerprint}-{config.context}"
        self._nats_to_bits = data.train.num_tokens / max(1, data.train.num_bytes) / math.log(2)

    def build(self, seed: int | None = None, *, initialize: bool = True) -> LanguageModel:
        """The model; arguments as of its constructor."""
        return LanguageModel(self.config, seed=seed, initialize=initialize)

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits and of the model."""
        with torch.device("meta"):
            total, active = self.build(initialize=False).num_parameters()
        splits = {name: getattr(self.data, name) for name in ("train", "validation", "test")}
        lines = [
            f"{name:<10} {s.num_bytes:>12,} bytes {s.num_tokens:>12,} tokens {s.num_documents:>7,} document"
            + "s" * (s.num_documents != 1)
            for name, s in splits.items()
        ]
        lines += [f"{name}: {note}" for name, note in self.data.notes.items()]
        lines.append(f"model: {total:,} parameters, {active:,} of them at work on a token")
        if not torch.cuda.is_available() and (kernels := kernels_in_use()) != "compiled":
            lines.append(f"kernels: {kernels}; compiled ones make a step on a CPU shorter, see quintic doctor")
        data = {
            name: {"bytes": s.num_bytes, "tokens": s.num_tokens, "documents": s.num_documents}
            for name, s in splits.items()
        }
        return lines, {"parameters_total": total, "parameters_active": active, "data": data}

    def batch(self, examples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Windows of the training split: ``ids`` and ``targets``, (examples, context) int64."""
        return self._tensors(self.data.train, examples)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Summed cross-entropy of the predicted tokens, in nats."""
        targets = batch["targets"]
        predicted = targets >= 0
        count = int(predicted.sum())
        counted = None if count == targets.numel() else predicted
        total = model(batch["ids"], documents=batch.get("documents"), counted=counted, targets=targets)
        if not model.training:
            return Loss(total, count)
        # Auxiliary losses are means over tokens: times the count, the loop's one division makes their weighted mean.
        return Loss(total, count, regularizer=count * aux_loss(model))

    def after_step(self, model: nn.Module, progress: float) -> dict[str, Any]:
        """Balance the experts; load, bias and entropy per layer, MaxVio and its floor. Clip attention, if asked to."""
        return self._balance(model, progress) | _clip_attention(model)

    def _balance(self, model: nn.Module, progress: float) -> dict[str, Any]:
        layers = balance_step(model, progress=progress)
        if not layers:
            return {}
        c = self.config
        return {
            "max_vio": [layer.max_violation for layer in layers],
            "max_vio_floor": sampling_floor(layers[0].tokens, c.num_experts, c.top_k),
            "dead_experts": sum(layer.dead_experts for layer in layers),
            "expert_load": [layer.load for layer in layers],
            "expert_bias": [layer.bias for layer in layers],
            "router_entropy": [layer.entropy for layer in layers],
            **({"aux_loss": [layer.aux_loss for layer in layers]} if layers[0].aux_loss is not None else {}),
        }

    def step_metrics(self, loss: float) -> dict[str, float]:
        """Bits per byte of a training step."""
        return {"bits_per_byte": loss * self._nats_to_bits}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, should_stop: Callable[[], bool] = lambda: False, ranks: Ranks = ALONE
    ) -> dict[str, Any] | None:
        """Loss and bits per byte of every token of a split, shared among the ranks; None if stopped midway."""
        chosen: Split = getattr(self.data, split)
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        nats, count = 0.0, 0
        try:
            per_batch = max(1, _EVAL_TOKENS // self.config.context)
            total = num_windows(chosen, self.config.context)
            if not total:
                return {}  # no validation was asked for
            row_v, rows = _occurring(chosen, self.config.vocab_size)
            row_v = row_v.to(device)
            with RouteRecorder(model, rows, most=chosen.num_tokens) as routes:
                for turn in ranks.turns(-(-total // per_batch)):
                    if should_stop():
                        return None
                    start = per_batch * (turn or 0)
                    numbers = np.arange(start, min(start + per_batch, total))
                    batch = {name: tensor.to(device) for name, tensor in self._tensors(chosen, numbers).items()}
                    known = (
                        batch["targets"] >= 0 if turn is not None else torch.zeros_like(batch["ids"], dtype=torch.bool)
                    )
                    routes.tokens = torch.where(known, row_v[batch["ids"]], -1)
                    loss = self.loss(model, batch)
                    if turn is not None:  # else it was for company: ranks that share weights work together
                        nats += float(loss.total)
                        count += loss.count
        finally:
            model.train(was_training)
        nats, count = ranks.sum(nats, count)
        for table in routes.tables:
            ranks.sum_(table)
        prefix = "val" if split == "validation" else split
        return {
            f"{prefix}_loss": nats / max(1, count),
            f"{prefix}_bits_per_byte": nats / math.log(2) / max(1, chosen.num_bytes),
            **self._routing_metrics(routes, prefix, int(count)),
        }

    def _routing_metrics(self, routes: RouteRecorder, prefix: str, tokens: int) -> dict[str, Any]:
        """Balance over the whole split, and how far the token alone decides its experts, per layer."""
        if not routes.tables:
            return {}
        return {
            f"{prefix}_max_vio": routes.max_violation,
            f"{prefix}_max_vio_floor": sampling_floor(tokens, self.config.num_experts, self.config.top_k),
            f"{prefix}_specialisation": routes.specialisation,
        }

    def sample(self, model: nn.Module, path: Path, seed: int, should_stop: Callable[[], bool]) -> str:
        """Text that the model makes after a document's start, written to ``path.txt``."""
        assert isinstance(model, LanguageModel)
        text = "".join(
            generate_text(model, self.data.tokenizer, "", max_tokens=_SAMPLE_TOKENS, seed=seed, should_stop=should_stop)
        )
        atomic_write(path.with_name(path.name + ".txt"), text + "\n")
        return text

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one window."""
        assert isinstance(model, LanguageModel)
        return model.flops_per_token(self.config.context) * self.config.context

    def save_with(self, folder: Path) -> None:
        """Put the tokenizer into a run folder, and the files that it came with."""
        self.data.tokenizer.save(folder / "tokenizer.json")

    def _tensors(self, split: Split, numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        ids, targets = windows(split, numbers, self.config.context)
        tokenizer = self.data.tokenizer
        if tokenizer.begin_id != tokenizer.separator_id:
            targets = np.where(targets == tokenizer.begin_id, -1, targets)  # nobody asks a model where a text begins
        tensors = {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}
        if not self.cross_documents:
            tensors["documents"] = torch.from_numpy(document_ids(ids, tokenizer.begin_id))
        return tensors


def _occurring(split: Split, vocab_size: int) -> tuple[Tensor, int]:
    """(vocabulary,) numbers of the ids that occur in a split, in their order, and how many they are.

    Tables of the routing have a row for these alone: one for every id of a vocabulary of 160,000 would be gigabytes in
    a model of 26 layers of 64 experts, mostly empty.
    """
    occurs = np.zeros(vocab_size, dtype=bool)
    for start in range(0, split.num_tokens, _LOOKED_AT):
        occurs[split.ids[start : start + _LOOKED_AT]] = True
    return torch.from_numpy(np.cumsum(occurs) - 1), int(occurs.sum())


def _clip_attention(model: nn.Module) -> dict[str, Any]:
    """QK-clip of every layer: the largest logit of the step, and on how many heads it was too large."""
    layers = [layer for layer in model.modules() if isinstance(layer, LatentAttention)]
    seen = [(layer, layer.largest_logits) for layer in layers if layer.largest_logits is not None]
    if not seen:
        return {}
    largest = torch.stack([logits for _, logits in seen])
    if dist.is_available() and dist.is_initialized():  # every process must shrink by the same factors
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    factors = torch.stack([layer.clip_qk_(row) for (layer, _), row in zip(seen, largest, strict=True)])
    return {"max_logit": float(largest.max()), "qk_clipped_heads": int((factors < 1).sum())}


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop_at_end: bool = True,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Yield pieces of text that continue a prompt, each a whole number of characters.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        prompt: Text; empty starts a new document.
        stop_at_end: End where the model ends the document.
        stop: End before the first of these strings.
        **options: See :func:`quintic.lm.generate`.
    """
    from quintic.data.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.prompt(prompt)
    stop_ids = tokenizer.end_ids if stop_at_end else ()
    stop = [text for text in stop if text]
    held = ""  # what may be the beginning of a stop string
    for token in generate(model, ids, num_ids=tokenizer.vocab_size, stop_ids=stop_ids, **options):
        held += decoder.push(token)
        found = [place for text in stop if (place := held.find(text)) >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held
