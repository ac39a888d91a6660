"""Text from a model, one token at a time, for one prompt or for several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.core.counter_rng import Stream
from quintic.lm.model import LanguageModel
from quintic.lm.token_step import TokenStep, suits

__all__ = ["Sampling", "generate", "generate_batch", "sample_token"]


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from its logits. The filters apply in the order of the fields.

    Raises:
        ConfigError: A value is out of range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided (negative ones multiplied) by it; 1 is none (Keskar et al. 2019)."""
    temperature: float = 0.7
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.9
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all."""

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {expected}, found {getattr(self, name)}")


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = 100,
    seed: int = 0,
    num_ids: int | None = None,
    stop_ids: Sequence[int] = (),
    should_stop: Callable[[], bool] = lambda: False,
    **sampling: float,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` token ids that continue a prompt.

    Args:
        model: In any mode; load is not counted because it is set to evaluation while this runs.
        prompt: At least one id, as of :meth:`quintic.data.Tokenizer.prompt`; for text as such there is
            :func:`quintic.lm.generate_text`. Only the last ``context`` of prompt and text are seen.
        max_tokens: Tokens to make.
        seed: Token i depends on the seed, the text before it and nothing else.
        num_ids: Ids from here on are never made (padding rows of the vocabulary).
        stop_ids: End before yielding one of these.
        should_stop: Polled once a token.
        **sampling: Fields of :class:`Sampling`.

    Raises:
        ConfigError: A sampling setting is unknown or out of range.
        DataError: The prompt is text, is empty or has an id that the vocabulary lacks.
    """
    for (token,) in _decode(model, [prompt], [seed], max_tokens, num_ids, stop_ids, should_stop, sampling):
        assert token is not None
        yield token


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 100,
    seed: int | Sequence[int] = 0,
    num_ids: int | None = None,
    stop_ids: Sequence[int] = (),
    **sampling: float,
) -> list[list[int]]:
    """Continue several prompts of any lengths at once; each gets the text that it would get alone.

    That holds up to rounding, and as long as the longest prompt and its text fit in the context.

    Args:
        model: As for :func:`generate`.
        prompts: At least one id each.
        max_tokens: Tokens to make for each.
        seed: One for all, or one for each.
        num_ids: As for :func:`generate`.
        stop_ids: A row ends before one of these.
        **sampling: Fields of :class:`Sampling`.

    Raises:
        ConfigError: A setting is unknown or out of range, or the seeds are not as many as the prompts.
        DataError: A prompt is text, is empty or has an id that the vocabulary lacks.
    """
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ConfigError(f"expected one seed or {len(prompts)}, one for each prompt; found {len(seeds)}")
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in _decode(model, prompts, seeds, max_tokens, num_ids, stop_ids, lambda: False, sampling):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


@torch.inference_mode()
def _decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_tokens: int,
    num_ids: int | None,
    stop_ids: Sequence[int],
    should_stop: Callable[[], bool],
    sampling: dict[str, float],
) -> Iterator[list[int | None]]:
    """Yield the next token of every row; None for a row that has ended. Ends when all have."""
    if unknown := sampling.keys() - Sampling.__dataclass_fields__.keys():
        raise ConfigError(
            f"unknown setting {sorted(unknown)[0]!r}; expected one of: {', '.join(Sampling.__dataclass_fields__)}"
        )
    rule = Sampling(**sampling)  # type: ignore[arg-type]
    if max_tokens < 0:
        raise ConfigError(f"max_tokens must be 0 or more, found {max_tokens}")
    size, context = model.config.vocab_size, model.config.context
    for prompt in prompts:
        _check_prompt(prompt, size)
    if not prompts:
        return
    noises = [Stream(seed, "generate") for seed in seeds]
    texts = [list(prompt) for prompt in prompts]
    ended = [False] * len(texts)
    was_training = model.training
    model.eval()
    try:
        quick = TokenStep(model, num_ids) if suits(model) else None
        device = model.rotation.device
        cache = model.new_cache(len(texts))
        unseen, documents = _left_padded([text[-context:] for text in texts])
        for step in range(max_tokens):
            if should_stop():
                return
            if cache[0].length + len(unseen[0]) > context:
                # The window is full: start again from its newer half.
                cache = model.new_cache(len(texts))
                unseen, documents = _left_padded([text[-max(1, context // 2) :] for text in texts])
            ids = torch.tensor(unseen, device=device)
            if quick is not None and cache[0].length:
                logits = quick(ids[:, 0], cache)
            else:
                marks = None if documents is None else torch.tensor(documents, device=device)
                logits = model(ids, documents=marks, cache=cache)[:, -1, :num_ids]
                if quick is not None:
                    quick.hide(documents, context)
            tokens: list[int | None] = []
            for row, token in enumerate(_picked(logits, rule, noises, step, texts)):
                ended[row] = ended[row] or token in stop_ids
                tokens.append(None if ended[row] else token)
                texts[row].append(texts[row][-1] if ended[row] else token)
            if all(ended):
                return
            unseen = [[text[-1]] for text in texts]
            if documents is not None and quick is None:
                documents = [[*row, 1] for row in documents]
            yield tokens
    finally:
        model.train(was_training)


def _check_prompt(prompt: Sequence[int], size: int) -> None:
    """Refuse what is no sequence of token ids.

    Raises:
        DataError: It is empty, or has something else than ids of the vocabulary.
    """
    several = isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes)
    if not several or not all(isinstance(token, Integral) for token in prompt):
        raise DataError(
            f"a prompt must be token ids, found {prompt!r:.60}; make them of text with the run's tokenizer: "
            'generate(model, tokenizer.prompt("...")), or let quintic.lm.generate_text take the text itself'
        )
    if not len(prompt) or min(prompt) < 0 or max(prompt) >= size:
        raise DataError(f"a prompt must be one or more token ids below {size}")


def _picked(
    logits_bv: Tensor, rule: Sampling, noises: Sequence[Stream], step: int, texts: Sequence[Sequence[int]]
) -> list[int]:
    """The next token of every row."""
    if rule.temperature == 0 and rule.repetition_penalty == 1.0:
        return logits_bv.argmax(dim=-1).tolist()
    draws = (float(noise.uniform(step, 1)[0]) for noise in noises)
    rows = zip(logits_bv, draws, texts, strict=True)
    return [sample_token(logits, uniform, rule, text) for logits, uniform, text in rows]


def _left_padded(texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]] | None]:
    """Rows of one length, and which elements are text (1) and padding (0); None if nothing was padded.

    Padding stands before the text: positions are relative, so a shift of all of them changes nothing.
    """
    longest = max(map(len, texts))
    if all(len(text) == longest for text in texts):
        return texts, None
    gaps = [longest - len(text) for text in texts]
    rows = [[text[0]] * gap + text for text, gap in zip(texts, gaps, strict=True)]
    return rows, [[0] * gap + [1] * (longest - gap) for gap in gaps]


def sample_token(logits: Tensor, uniform: float, rule: Sampling, seen: Sequence[int] = ()) -> int:
    """Pick a token by inverse distribution function over the tokens sorted by probability.

    Args:
        logits: (vocabulary,).
        uniform: A number in (0, 1).
        rule: Temperature and filters; greedy takes the lower id of a tie.
        seen: Tokens before, for the repetition penalty.

    Example:
        >>> sample_token(torch.tensor([0.0, 2.0, 1.0]), 0.99, Sampling(temperature=1.0, top_k=2, top_p=1.0))
        2
    """
    logits = logits.cpu().double()
    if rule.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted({token for token in seen if token < len(logits)}), device=logits.device)
        old = logits[ids]
        logits[ids] = torch.where(old > 0, old / rule.repetition_penalty, old * rule.repetition_penalty)
    if rule.temperature == 0:
        return int(logits.argmax())  # the first of equal ones
    values, ids = torch.sort(logits, descending=True, stable=True)
    probability = torch.softmax(values / rule.temperature, dim=0)
    if rule.top_k:
        probability = probability[: rule.top_k]
    cumulative = probability.cumsum(0)
    if rule.top_p < 1.0:
        kept = int((cumulative < rule.top_p * cumulative[-1]).sum()) + 1
        cumulative = cumulative[:kept]
    if rule.min_p > 0.0:
        cumulative = cumulative[: int((probability[: len(cumulative)] >= rule.min_p * probability[0]).sum())]
    return int(ids[int((cumulative <= uniform * cumulative[-1]).sum().clamp(max=cumulative.numel() - 1))])
