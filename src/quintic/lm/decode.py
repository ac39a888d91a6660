"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.core.counter_rng import Stream
from quintic.lm.model import LanguageModel

__all__ = ["generate", "sample_token"]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = 100,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.9,
    seed: int = 0,
    num_ids: int | None = None,
    stop_ids: Sequence[int] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` token ids that continue a prompt.

    Args:
        model: In any mode; load is not counted because it is set to evaluation while this runs.
        prompt: At least one id. Only the last ``context`` of prompt and text are seen.
        max_tokens: Tokens to make.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens with at least this probability.
        seed: Token i depends on the seed, the text before it and nothing else.
        num_ids: Ids from here on are never made (padding rows of the vocabulary).
        stop_ids: End before yielding one of these.
        should_stop: Polled once a token.

    Raises:
        ConfigError: A sampling setting is out of range.
        DataError: The prompt is empty or has an id that the vocabulary lacks.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_tokens < 0:
        raise ConfigError(
            "temperature, top_k and max_tokens must be at least 0 and top_p in (0, 1]; found "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}, max_tokens={max_tokens}"
        )
    size = model.config.vocab_size
    if not prompt or min(prompt) < 0 or max(prompt) >= size:
        raise DataError(f"the prompt must be one or more token ids below {size}")
    context = model.config.context
    noise = Stream(seed, "generate")
    text = list(prompt)
    was_training = model.training
    model.eval()
    try:
        cache, unseen = model.new_cache(), text[-context:]
        for step in range(max_tokens):
            if should_stop():
                return
            if cache[0].length + len(unseen) > context:
                # The window is full: start again from its newer half.
                cache, unseen = model.new_cache(), text[-max(1, context // 2) :]
            logits = model(torch.tensor([unseen], device=model.rotation.device), cache=cache)[0, -1]
            token = sample_token(
                logits[:num_ids], float(noise.uniform(step, 1)[0]), temperature=temperature, top_k=top_k, top_p=top_p
            )
            if token in stop_ids:
                return
            text.append(token)
            unseen = [token]
            yield token
    finally:
        model.train(was_training)


def sample_token(logits: Tensor, uniform: float, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> int:
    """Pick a token by inverse distribution function over the tokens sorted by probability.

    Args:
        logits: (vocabulary,).
        uniform: A number in (0, 1).
        temperature: 0 picks the likeliest, the lower id of a tie.
        top_k: Keep the k likeliest; 0 keeps all.
        top_p: Keep the smallest likeliest set with at least this probability.

    Example:
        >>> sample_token(torch.tensor([0.0, 2.0, 1.0]), 0.99, temperature=1.0, top_k=2)
        2
    """
    values, ids = torch.sort(logits.cpu().double(), descending=True, stable=True)
    if temperature == 0:
        return int(ids[0])
    probability = torch.softmax(values / temperature, dim=0)
    if top_k:
        probability = probability[:top_k]
    cumulative = probability.cumsum(0)
    if top_p < 1.0:
        kept = int((cumulative < top_p * cumulative[-1]).sum()) + 1
        cumulative = cumulative[:kept]
    return int(ids[int((cumulative <= uniform * cumulative[-1]).sum().clamp(max=cumulative.numel() - 1))])
