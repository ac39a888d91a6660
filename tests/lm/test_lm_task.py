"""What training is told: losses, bits per byte, balance and specialisation, against sums written out token by token."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from quintic.data import DataConfig
from quintic.data.tokenizer import Tokenizer
from quintic.data.tokens import prepare
from quintic.lm import LanguageModel, LMConfig
from quintic.lm import task as module
from quintic.lm.task import LanguageModelTask, derived_fields
from quintic.moe import RouteRecorder, max_violation, sampling_floor, specialisation

CONFIG = LMConfig(context=16, d_model=32, num_layers=2)
SENTENCES = [f"{i} and {i + 1} add up to {2 * i + 1}." for i in range(60)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, sentence in enumerate(SENTENCES):
        (folder / f"{number:02}.txt").write_text(sentence, encoding="utf-8")
    return prepare([folder], DataConfig(tokenizer="byte", validation_fraction=0.2, test_fraction=0.1))


def make(data, *, cross_documents=True, **changes):
    task = LanguageModelTask(replace(CONFIG, **changes), data, cross_documents=cross_documents)
    return task, task.build(0)


def written_out(model, split, separator=None):
    """Nats and predictions of a split, and which experts each token chose: one window, and one document, at a time."""
    ids, nats, count, chosen = split.ids.astype(np.int64).tolist(), 0.0, 0, Counter()
    router = model.blocks[1].ffn.router
    routed = []
    handle = router.register_forward_hook(lambda _, inputs, routing: routed.append(routing.ids_nk))
    for start in range(0, len(ids) - 1, model.config.context):
        window = ids[start : start + model.config.context + 1]
        cuts = [0, *(i for i in range(1, len(window) - 1) if window[i] == separator), len(window) - 1]
        for first, last in itertools.pairwise(cuts):
            with torch.no_grad():
                logits = model(torch.tensor([window[first:last]]))[0].double()
            for row, target in zip(logits, window[first + 1 : last + 1], strict=True):
                nats += float(row.logsumexp(0) - row[target])
                count += 1
            for token, experts in zip(window[first:last], routed.pop().tolist(), strict=True):
                chosen.update((token, expert) for expert in experts)
    handle.remove()
    table = torch.zeros(model.config.vocab_size, model.config.num_experts)
    for (token, expert), times in chosen.items():
        table[token, expert] = times
    return nats, count, table


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_is_that_of_every_token_once(data, monkeypatch, split, cross_documents):
    monkeypatch.setattr(module, "_EVAL_TOKENS", 3 * CONFIG.context)  # many batches, the last one smaller
    monkeypatch.setattr(module, "_LOOKED_AT", 50)
    tables = []

    class Watched(RouteRecorder):
        def __exit__(self, *error):
            tables.extend(self.tables)
            super().__exit__(*error)

    monkeypatch.setattr(module, "RouteRecorder", Watched)
    task, model = make(data, cross_documents=cross_documents)
    with torch.no_grad():
        model.blocks[1].ffn.router.weight.mul_(20)  # routes that depend on the token
    chosen = getattr(data, split)
    assert (chosen.num_tokens - 1) % CONFIG.context  # the last window is padded
    found = task.evaluate(model.train(), split)
    assert model.training and not model.blocks[1].ffn.counts.any()  # no load of training
    separator = None if cross_documents else data.tokenizer.separator_id
    nats, count, table = written_out(model.eval(), chosen, separator)
    assert count == chosen.num_tokens - 1
    prefix = {"validation": "val", "test": "test"}[split]
    assert found[f"{prefix}_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found[f"{prefix}_bits_per_byte"] == pytest.approx(nats / math.log(2) / chosen.num_bytes, rel=1e-5)
    assert found[f"{prefix}_max_vio"] == [pytest.approx(max_violation(table.sum(0)))]
    assert found[f"{prefix}_max_vio_floor"] == sampling_floor(count, CONFIG.num_experts, CONFIG.top_k)
    assert found[f"{prefix}_specialisation"] == [pytest.approx(specialisation(table, CONFIG.top_k), rel=1e-12)]
    assert 0.05 < found[f"{prefix}_specialisation"][0] < 1
    # Rows for the ids that occur alone, in half of the memory of int64.
    (small,) = tables
    assert small.shape[0] == len(np.unique(chosen.ids)) < CONFIG.vocab_size / 4 and small.dtype == torch.int32
    assert torch.equal(small[small.sum(1) > 0], table[table.sum(1) > 0].int())


def test_nothing_to_evaluate_and_an_evaluation_that_is_stopped(data, tmp_path):
    (tmp_path / "one.txt").write_text("all for training " * 20, encoding="utf-8")
    alone = prepare([tmp_path], DataConfig(tokenizer="byte", validation_fraction=0.0, test_fraction=0.0))
    task, model = make(alone)
    assert task.evaluate(model, "validation") == {}
    task, model = make(data)
    assert task.evaluate(model.train(), "validation", lambda: True) is None and model.training
    task, model = make(data, dense=True)
    assert task.evaluate(model, "validation").keys() == {"val_loss", "val_bits_per_byte"}


def test_a_training_step_counts_what_is_predicted_and_weighs_auxiliary_losses_by_it(data):
    task, model = make(data, aux_weight=0.5, aux_over="sequence")
    last = np.arange(task.num_examples - 3, task.num_examples)
    batch = task.batch(last)
    predicted = int((batch["targets"] >= 0).sum())
    assert 2 * CONFIG.context < predicted < 3 * CONFIG.context
    loss = task.loss(model.train(), batch)
    assert loss.count == predicted
    # The only layer's loss is a mean over tokens; the loop divides by the count.
    (auxiliary,) = (block.ffn.meter.sums[2].item() * 1e-9 for block in model.blocks[1:])
    assert loss.regularizer.item() == pytest.approx(predicted * auxiliary, rel=1e-5) and auxiliary > 0
    stats = task.after_step(model, 0.5)
    (layer,) = (block.ffn.stats for block in model.blocks[1:])
    assert layer.tokens == predicted and stats["aux_loss"] == [pytest.approx(auxiliary)]
    assert stats["max_vio"] == [layer.max_violation] and stats["expert_load"] == [layer.load]
    assert stats["max_vio_floor"] == sampling_floor(predicted, CONFIG.num_experts, CONFIG.top_k)
    assert stats["expert_bias"] == [model.blocks[1].ffn.router.bias.tolist()]
    assert stats["router_entropy"] == [layer.entropy]
    evaluated = task.loss(model.eval(), batch)
    assert evaluated.regularizer is None and evaluated.total.item() == pytest.approx(loss.total.item(), rel=0.1)
    train = data.train
    assert task.step_metrics(2.0)["bits_per_byte"] == pytest.approx(
        2.0 * train.num_tokens / train.num_bytes / math.log(2)
    )
    assert task.flops_per_example(model) == CONFIG.context * model.flops_per_token(CONFIG.context)


def test_dead_experts_of_all_layers_are_added_and_the_bias_rests_at_the_end(data):
    task, model = make(data, num_layers=4, balance_rest=0.25)
    for progress, moves in ((0.5, True), (0.8, False)):
        before = [block.ffn.router.bias.clone() for block in model.blocks[1:]]
        with torch.no_grad():
            for block in model.blocks[1:]:
                block.ffn.router.weight.mul_(0.0)[1] = 1.0  # so that many experts are chosen by none
        task.loss(model.train(), task.batch(np.arange(1)))
        stats = task.after_step(model, progress)
        layers = [block.ffn.stats for block in model.blocks[1:]]
        assert stats["dead_experts"] == sum(load == 0 for layer in layers for load in layer.load) > 8
        assert "aux_loss" not in stats
        after = [block.ffn.router.bias for block in model.blocks[1:]]
        assert all(torch.equal(a, b) != moves for a, b in zip(before, after, strict=True))


def test_numbers_that_follow_from_the_tokenizer_and_the_experts():
    tokenizer = Tokenizer.bytes()
    found = derived_fields(CONFIG, tokenizer)
    assert tokenizer.vocab_size == 257 and found["vocab_size"][0] == 264
    scale = LanguageModel(CONFIG, initialize=False).config.route_scale
    assert found["route_scale"][0] == pytest.approx(scale, abs=5e-4)
    for fixed in (replace(CONFIG, route_scale=2.0), replace(CONFIG, dense=True), replace(CONFIG, num_dense_layers=2)):
        assert derived_fields(fixed, tokenizer).keys() == {"vocab_size"}


def test_windows_of_another_length_are_another_order(data):
    short, long = (make(data, context=context)[0] for context in (16, 32))
    assert short.fingerprint != long.fingerprint and short.num_examples > long.num_examples
