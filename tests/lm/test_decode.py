"""Generation: seeds, greedy, filters, windows longer than the context, stop ids."""

import numpy as np
import pytest
import torch

from quintic.core import ConfigError, DataError
from quintic.lm import LanguageModel, LMConfig, generate
from quintic.lm.decode import sample_token

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(LMConfig())
    with torch.no_grad():
        model.head.weight.mul_(30)  # a model with opinions
    return model


def test_greedy_follows_the_uncached_argmax_even_past_the_context(model):
    context = model.config.context
    made = list(generate(model, PROMPT, max_tokens=80, temperature=0))
    text = PROMPT + made
    window_start = 0
    for i in range(3, len(text)):
        if i - window_start > context:
            window_start = i - context // 2
        logits = model(torch.tensor([text[window_start:i]]))[0, -1]
        assert logits.argmax() == text[i]


def test_seed_decides_and_the_mode_comes_back(model):
    model.train()
    for block in model.blocks[1:]:
        block.ffn.counts.zero_()
    runs = [list(generate(model, PROMPT, max_tokens=30, seed=seed, temperature=1.0)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert model.training and all(block.ffn.counts.sum() == 0 for block in model.blocks[1:])


def test_a_longer_run_starts_with_the_shorter_one(model):
    short = list(generate(model, PROMPT, max_tokens=10, temperature=1.0))
    assert list(generate(model, PROMPT, max_tokens=20, temperature=1.0))[:10] == short


def test_ids_beyond_the_tokenizer_are_never_made(model):
    assert max(generate(model, PROMPT, max_tokens=200, temperature=5.0, num_ids=17)) < 17


def test_stop_ids_end_the_text_and_polling_stops_it(model):
    made = list(generate(model, PROMPT, max_tokens=50, temperature=1.0))
    stop = made[20]
    assert list(generate(model, PROMPT, max_tokens=50, temperature=1.0, stop_ids=[stop])) == made[: made.index(stop)]
    assert list(generate(model, PROMPT, max_tokens=50, should_stop=lambda: True)) == []


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    uniform = (np.arange(20_000) + 0.5) / 20_000
    for temperature in (0.5, 1.0):
        counts = np.bincount([sample_token(logits, u, temperature=temperature) for u in uniform[::10]], minlength=4)
        expected = torch.softmax(logits / temperature, 0).numpy()
        assert np.abs(counts / counts.sum() - expected).max() < 2e-3


def test_filters_keep_the_likeliest():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    seen = lambda **kw: {sample_token(logits, u, temperature=1.0, **kw) for u in np.linspace(0.001, 0.999, 99)}  # noqa: E731
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.65) == {1, 3}
    assert seen(top_p=0.75) == {1, 2, 3}
    assert seen(top_p=1e-9) == {1}
    assert sample_token(torch.tensor([1.0, 1.0]), 0.99, temperature=0) == 0


def test_bad_requests(model):
    with pytest.raises(ConfigError, match="top_p"):
        next(generate(model, PROMPT, top_p=0.0))
    with pytest.raises(DataError, match="token ids below 264"):
        next(generate(model, [264]))
    with pytest.raises(DataError):
        next(generate(model, []))
