"""Generation: seeds, greedy, filters, windows longer than the context, stop ids."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.devices import meta_by_default

from quintic.core import ConfigError, DataError
from quintic.data.tokenizer import Tokenizer
from quintic.lm import LanguageModel, LMConfig, generate
from quintic.lm.decode import Sampling, generate_batch, sample_token
from quintic.lm.task import generate_text
from quintic.lm.token_step import TokenStep, suits

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(replace(LMConfig(), context=32), seed=0)
    with torch.no_grad():
        model.head.weight.mul_(30)  # a model with opinions
    return model


def test_greedy_follows_the_uncached_argmax_even_past_the_context(model):
    context = model.config.context
    made = list(generate(model, PROMPT, max_tokens=50, temperature=0))
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
    assert max(generate(model, PROMPT, max_tokens=60, temperature=5.0, num_ids=17)) < 17


def test_stop_ids_end_the_text_and_polling_stops_it(model):
    made = list(generate(model, PROMPT, max_tokens=50, temperature=1.0))
    stop = made[20]
    assert list(generate(model, PROMPT, max_tokens=50, temperature=1.0, stop_ids=[stop])) == made[: made.index(stop)]
    assert list(generate(model, PROMPT, max_tokens=50, should_stop=lambda: True)) == []


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    uniform = (np.arange(20_000) + 0.5) / 20_000
    for temperature in (0.5, 1.0):
        counts = np.bincount(
            [sample_token(logits, u, Sampling(temperature=temperature, top_p=1.0)) for u in uniform[::10]], minlength=4
        )
        expected = torch.softmax(logits / temperature, 0).numpy()
        assert np.abs(counts / counts.sum() - expected).max() < 2e-3
    # Among the tokens that a filter keeps, too.
    for kept, filters in (([3, 1], {"top_k": 2}), ([3, 1, 0], {"top_p": 0.9}), ([3, 1], {"min_p": 0.2})):
        rule = Sampling(**{"temperature": 1.0, "top_p": 1.0, **filters})
        counts = np.bincount([sample_token(logits, u, rule) for u in uniform[::10]], minlength=4)
        expected = np.zeros(4)
        expected[kept] = torch.softmax(logits[kept], 0).numpy()
        assert np.abs(counts / counts.sum() - expected).max() < 2e-3


def test_filters_keep_the_likeliest():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))

    def seen(**filters):
        rule = Sampling(**{"temperature": 1.0, "top_p": 1.0, **filters})
        return {sample_token(logits, u, rule) for u in np.linspace(0.001, 0.999, 99)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.65) == {1, 3}
    assert seen(top_p=0.75) == {1, 2, 3}
    assert seen(top_p=1e-9) == {1}
    assert seen(min_p=0.6) == {1, 3} and seen(min_p=0.4) == {1, 2, 3} and seen(min_p=1.0) == {1}
    assert seen(top_k=3, top_p=0.75) == {1, 3}
    assert sample_token(torch.tensor([1.0, 1.0]), 0.99, Sampling(temperature=0)) == 0


def test_the_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for penalty in (0.5, 1.3, 4.0):
        for seen in ([3, 3, 7], list(range(40))):
            theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[
                0
            ]
            rule = Sampling(temperature=0, repetition_penalty=penalty)
            assert sample_token(logits, 0.5, rule, seen) == int(theirs.argmax())
    assert torch.equal(logits, torch.randn(50, generator=torch.Generator().manual_seed(0)))


def test_a_batch_of_prompts_of_any_lengths_says_what_each_would_say_alone(model):
    double = copy.deepcopy(model).double()
    prompts = [[1, 2, 3], [9], [5, 4, 3, 2, 1, 0, 7, 8, 9, 10], [9]]
    seeds = [4, 5, 6, 7]
    stop = list(generate(double, prompts[1], seed=5, max_tokens=20, temperature=1.0))[7]
    made = generate_batch(double, prompts, seed=seeds, max_tokens=20, temperature=1.0, stop_ids=[stop])
    for prompt, seed, row in zip(prompts, seeds, made, strict=True):
        assert row == list(generate(double, prompt, seed=seed, max_tokens=20, temperature=1.0, stop_ids=[stop]))
    assert len(made[1]) <= 7 and made[1] != made[3]
    assert generate_batch(double, [], max_tokens=3) == []
    # Past the context it goes on, from the newer half of every row.
    assert [len(row) for row in generate_batch(double, prompts, max_tokens=45, temperature=1.0)] == [45] * 4


def test_bad_requests(model):
    with pytest.raises(ConfigError, match="unknown setting 'top_q'"):
        next(generate(model, PROMPT, top_q=0.5))
    with pytest.raises(ConfigError, match="min_p"):
        next(generate(model, PROMPT, min_p=2))
    with pytest.raises(ConfigError, match="found 2"):
        generate_batch(model, [PROMPT], seed=[1, 2])
    for name, value in (("top_p", 0.0), ("temperature", -1.0), ("repetition_penalty", 0.0), ("top_k", -1)):
        with pytest.raises(ConfigError, match=name):
            next(generate(model, PROMPT, **{name: value}))
    with pytest.raises(ConfigError, match="max_tokens"):
        next(generate(model, PROMPT, max_tokens=-1))
    with pytest.raises(DataError, match="token ids"):
        next(generate(model, [3, -1]))
    with pytest.raises(DataError, match="token ids below 264"):
        next(generate(model, [264]))
    with pytest.raises(DataError):
        next(generate(model, []))


def test_stop_strings_end_the_text_before_them(model):
    tokenizer = Tokenizer.bytes()
    options = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "stop_at_end": False}
    whole = "".join(generate_text(model, tokenizer, "a", **options))
    for start, end in ((5, 8), (20, 21), (30, 36)):
        stop = whole[start:end]
        pieces = list(generate_text(model, tokenizer, "a", stop=["not in there", stop, ""], **options))
        assert "".join(pieces) == whole[: whole.index(stop)]
    assert "".join(generate_text(model, tokenizer, "a", stop=[whole[-3:] + "x"], **options)) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared": 0},
        {"num_shared": 2, "score": "softmax", "normalize_gates": False, "select": "sigmoid"},
        {"num_groups": 4, "top_groups": 2},
        {"dense": True, "qk_nope_dim": 8, "v_dim": 24},
    ],
)
def test_a_quick_step_is_a_step_of_the_model(changes):
    config = replace(LMConfig(), **changes)
    model = LanguageModel(config, seed=0).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
        for block in model.blocks[1:]:
            if not config.dense:
                block.ffn.router.bias.copy_(torch.linspace(-0.3, 0.3, config.num_experts))
        assert suits(model)
        quick, ids = TokenStep(model, 100), torch.randint(264, (3, 30), generator=torch.Generator().manual_seed(1))
        documents = torch.ones_like(ids)
        documents[1, :7] = 0
        expected = model(ids, documents=documents)[..., :100]
        cache = model.new_cache(3)
        model(ids[:, :10], documents=documents[:, :10], cache=cache)
        quick.hide(documents[:, :10].tolist(), config.context)
        for place in range(10, 30):
            torch.testing.assert_close(quick(ids[:, place], cache), expected[:, place])


@pytest.mark.parametrize("changes", [{"q_rank": 16}, {"normalize_experts": "rms"}])
def test_models_without_a_quick_step_write_what_they_would_uncached(changes):
    model = LanguageModel(replace(LMConfig(), **changes), seed=0).double()
    assert not suits(model)
    text = PROMPT + list(generate(model, PROMPT, max_tokens=20, temperature=0))
    logits = model(torch.tensor([text]))[0]
    assert logits[2:-1].argmax(-1).tolist() == text[3:]


def test_a_batch_without_a_quick_step_says_what_each_would_say_alone():
    """Padding before the shorter prompts stays out of sight when one token after the other goes through the model."""
    model = LanguageModel(replace(LMConfig(), q_rank=16, context=24), seed=0).double()
    with torch.no_grad():
        model.head.weight.mul_(30)
    prompts = [[1, 2, 3], [9], [5, 4, 3, 2, 1, 0, 7, 8, 9, 10]]
    assert not suits(model)
    made = generate_batch(model, prompts, seed=[4, 5, 6], max_tokens=12, temperature=1.0)
    for prompt, seed, row in zip(prompts, (4, 5, 6), made, strict=True):
        assert row == list(generate(model, prompt, seed=seed, max_tokens=12, temperature=1.0))


def test_what_has_no_quick_step():
    model = LanguageModel(LMConfig(), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not suits(model)
    assert suits(model) and not suits(model.bfloat16())
    assert not suits(LanguageModel(replace(LMConfig(), d_model=512, d_expert=256), initialize=False))


@pytest.mark.parametrize("changes", [{}, {"q_rank": 16}])
def test_text_does_not_depend_on_the_default_device(changes):
    """All tensors are where the model is."""
    model = LanguageModel(replace(LMConfig(), context=8, **changes), seed=0)
    options = {"seed": 1, "max_tokens": 8, "repetition_penalty": 1.2}
    expected = generate_batch(model, [PROMPT, [9]], **options)
    with meta_by_default():
        assert generate_batch(model, [PROMPT, [9]], **options) == expected
        alone = list(generate(model, PROMPT, **options))
    assert alone == list(generate(model, PROMPT, **options))


@pytest.mark.parametrize("prompt", ["Call me", b"Call me", ["Call", "me"], [1.5], [[1, 2]], 3])
def test_a_prompt_that_is_text_is_told_how_to_become_ids(prompt):
    model = LanguageModel(LMConfig(), seed=0)
    with pytest.raises(DataError, match=r"must be token ids, found .*; make them .* tokenizer\.prompt"):
        next(generate(model, prompt))
    with pytest.raises(DataError, match="must be token ids"):
        generate_batch(model, [prompt])


def test_a_prompt_may_be_an_array_of_ids():
    model = LanguageModel(LMConfig(), seed=0)
    expected = list(generate(model, PROMPT, max_tokens=3))
    assert list(generate(model, np.array(PROMPT), max_tokens=3)) == expected
