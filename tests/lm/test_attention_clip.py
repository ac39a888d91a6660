"""QK-clip in training: what is recorded, what is shrunk, and that it costs nothing when it is off."""

from dataclasses import replace

import pytest
import torch

import quintic.lm.mla as mla
from quintic.core import ConfigError
from quintic.data import DataConfig
from quintic.data.tokens import prepare
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.task import LanguageModelTask
from quintic.lm.task import _clip_attention as clip_attention
from quintic.optim import OptimConfig, build_optimizer

SMALL = LMConfig(num_layers=2, num_dense_layers=2, q_rank=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(400)), encoding="utf-8")
    return prepare([path], DataConfig(tokenizer="byte", validation_fraction=0.1, test_fraction=0.1))


def make(config, sharpness=1.0, seed=0):
    """A model whose heads have larger logits the higher their number."""
    model = LanguageModel(config, seed=seed)
    with torch.no_grad():
        for block in model.blocks:
            heads = block.attention.q.weight.view(config.num_heads, -1, block.attention.q.weight.shape[1])
            heads.mul_(sharpness ** torch.arange(config.num_heads).view(-1, 1, 1))
    return model


def logits_of_heads(model, ids, documents=None):
    """The largest logit of each head and layer, from matrices written out."""
    found = []

    def record(module, inputs, output):
        x, rotation, allowed = inputs[:3]
        c, (b, t, _) = module.config, x.shape
        q = module.q_norm(module.q_down(x)) if c.q_rank else x
        q = mla.rotate(module.q(q).view(b, t, c.num_heads, -1).transpose(1, 2), rotation)
        latent, rope = module.kv_down(x).split([c.kv_rank, c.qk_rope_dim], -1)
        rope = mla.rotate(rope, rotation[:, c.qk_nope_dim // 2 :])
        k = module.kv_up(module.kv_norm(latent)).view(b, t, c.num_heads, -1)[..., : c.qk_nope_dim].transpose(1, 2)
        k = torch.cat([k, rope[:, None].expand(-1, c.num_heads, -1, -1)], -1)
        seen = torch.ones(t, t, dtype=torch.bool).tril() if allowed is None else allowed
        logits = (q @ k.mT * k.shape[-1] ** -0.5).masked_fill(~seen, 0.0)
        found.append(logits.abs().amax((0, 2, 3)))

    hooks = [block.attention.register_forward_hook(record) for block in model.blocks]
    with torch.no_grad():
        model(ids, documents=documents)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def ids(b=3, t=24, seed=0):
    return torch.randint(0, SMALL.vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("q_rank", [0, 16])
@pytest.mark.parametrize("documents", [False, True])
def test_the_largest_logit_of_every_head_is_recorded_over_micro_batches(q_rank, documents):
    model = make(replace(SMALL, qk_clip=5.0, q_rank=q_rank, num_heads=4), 1.5).train()
    cut = torch.arange(24).expand(3, -1) // 9 if documents else None
    parts = [ids(seed=1), ids(seed=2)]
    for part in parts:
        model(part, documents=cut)
    expected = torch.maximum(*(logits_of_heads(model.eval(), part, cut) for part in parts))
    torch.testing.assert_close(torch.stack([block.attention.largest_logits for block in model.blocks]), expected)


def test_off_costs_nothing_and_on_changes_no_output(monkeypatch):
    monkeypatch.setattr(mla, "fits_causal_attention", lambda *inputs: False)  # which does not give its logits
    off, on = make(SMALL).train(), make(replace(SMALL, qk_clip=1e-3)).train()
    a, b = off(ids()), on(ids())
    assert torch.equal(a, b)
    for model, out in ((off, a), (on, b)):
        out.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(off.parameters(), on.parameters(), strict=True))

    def fail(*arguments, **keywords):
        raise AssertionError("logits were computed")

    monkeypatch.setattr(mla, "max_logits", fail)
    off(ids())
    on.eval()(ids())  # nor in validation and sampling
    with pytest.raises(AssertionError, match="logits were computed"):
        on.train()(ids())


def test_no_more_than_a_piece_of_the_logits_is_held(monkeypatch):
    """Shapes of the products in which the largest logit is found."""
    monkeypatch.setattr("quintic.optim.qk_clip._LOGITS", 2 * 24 * 5)
    pieces = []
    real = torch.Tensor.tril
    monkeypatch.setattr(torch.Tensor, "tril", lambda t, *a: pieces.append(tuple(t.shape)) or real(t, *a))
    make(replace(SMALL, qk_clip=1.0)).train()(ids())
    assert set(pieces) == {(2, 5, 24), (2, 4, 24)}


@pytest.mark.parametrize("cross_documents", [True, False])
def test_after_a_step_no_logit_of_the_batch_is_above_the_threshold(data, cross_documents):
    """The factor is that of the logits before the step; a small step leaves them below tau up to its own size."""
    config = replace(SMALL, vocab_size=264, num_layers=1, num_dense_layers=1, num_heads=4, qk_clip=8.0)
    task = LanguageModelTask(config, data, cross_documents=cross_documents)
    model = make(config, 2.0).train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4, weight_decay=0.0))
    batch = task.batch(torch.arange(4).numpy())
    before = logits_of_heads(model.eval(), batch["ids"], batch.get("documents"))
    model.train()
    for half in range(2):  # two micro-batches
        part = {name: tensor[2 * half : 2 * half + 2] for name, tensor in batch.items()}
        task.loss(model, part).total.backward()
    optimizer.step()
    stats = task.after_step(model, 0.5)
    after = logits_of_heads(model.eval(), batch["ids"], batch.get("documents"))
    large = before > 8.0
    assert 0 < large.sum() < large.numel()
    assert stats["max_logit"] == pytest.approx(before.max().item(), rel=1e-5)
    assert stats["qk_clipped_heads"] == int(large.sum())
    assert after.max() <= 8.0 * 1.01
    torch.testing.assert_close(after[large], torch.full_like(after[large], 8.0), atol=0.08, rtol=0)
    torch.testing.assert_close(after[~large], before[~large], atol=0.08, rtol=0)
    assert task.after_step(model, 0.5) == {}  # forgotten


def test_several_layers_stay_below_the_threshold_over_a_run(data):
    """Clipped and not: with a rate that is too high, logits grow without the clip and stay near tau with it."""
    tops = {}
    for tau in (0.0, 3.0):
        config = replace(SMALL, vocab_size=264, qk_clip=tau)
        task = LanguageModelTask(config, data, cross_documents=True)
        model = LanguageModel(config, seed=0).train()
        optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.0))
        for step in range(12):
            batch = task.batch(torch.arange(8 * step, 8 * step + 8).numpy())
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            (loss.total / loss.count).backward()
            optimizer.step()
            stats = task.after_step(model, 0.5)
            assert ("max_logit" in stats) == (tau > 0)
        tops[tau] = logits_of_heads(model.eval(), batch["ids"]).max().item()
    assert tops[0.0] > 2 * tops[3.0]
    assert tops[3.0] < 2 * 3.0


def test_processes_agree_on_the_factors(data, monkeypatch):
    """As if another process had seen logits twice as large; the models of all stay equal."""
    task = LanguageModelTask(replace(SMALL, vocab_size=264, qk_clip=4.0), data, cross_documents=True)
    model = make(task.config).train()
    model(task.batch(torch.arange(4).numpy())["ids"])
    seen = torch.stack([block.attention.largest_logits for block in model.blocks])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op: t.mul_(2))
    before = [block.attention.q.weight.detach().clone() for block in model.blocks]
    stats = clip_attention(model)
    assert stats == {"max_logit": pytest.approx(2 * seen.max().item()), "qk_clipped_heads": int((2 * seen > 4).sum())}
    for block, q, logits in zip(model.blocks, before, 2 * seen, strict=True):
        heads = q.view(SMALL.num_heads, -1, SMALL.q_rank)
        now = block.attention.q.weight.detach().view_as(heads)
        factor = (4 / logits).clamp(max=1)[:, None, None]
        torch.testing.assert_close(now[:, SMALL.qk_nope_dim :], heads[:, SMALL.qk_nope_dim :] * factor)
        torch.testing.assert_close(now[:, : SMALL.qk_nope_dim], heads[:, : SMALL.qk_nope_dim] * factor.sqrt())


def test_a_negative_threshold_is_refused():
    with pytest.raises(ConfigError, match=r"lm\.qk_clip"):
        LMConfig(qk_clip=-1.0)
