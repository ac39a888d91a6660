"""Run by test_shared_validation.py on several ranks: a split shared out against the same validated by one."""

import torch

from quintic.data import image_task
from quintic.data.config import DataConfig
from quintic.data.images import ImageConfig, prepare_images
from quintic.data.tokens import prepare
from quintic.engine.mesh import join_ranks
from quintic.engine.shard import divide_
from quintic.flow import TarFlowConfig
from quintic.flow.task import TarFlowTask, derived_fields
from quintic.lm import LMConfig
from quintic.lm import task as lm_task

BATCHES = (1, 3, 4)
"""Fewer than the ranks, an odd number, an even one."""


def text_task():
    data = prepare(None, DataConfig(tokenizer="byte", validation_fraction=0.01))
    config = LMConfig(vocab_size=264, context=32, num_layers=2, d_model=16)
    return lm_task.LanguageModelTask(config, data, cross_documents=True)


def flow_task():
    data = prepare_images(None, ImageConfig(size=8, drawn=300, validation_fraction=0.4))
    config = TarFlowConfig(patch=4, width=16, blocks=2, layers=1, head_width=8)
    fields = {name: value for name, (value, _) in derived_fields(config, data).items()}
    return TarFlowTask(TarFlowConfig(**{**vars(config), **fields}), data)


def check(task, ranks, batches, exact):
    alone = task.build(0).double()
    divided = task.build(0).double()
    divide_(divided, ranks)
    expected = task.evaluate(alone, "validation", lambda: False)
    found = task.evaluate(divided, "validation", lambda: False, ranks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in exact:
            assert found[name] == value, name
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")
    calls, last = [], -(-batches // ranks.world)

    def should_stop():  # at the last turn, and only one rank has been told
        calls.append(1)
        return ranks.any(ranks.is_main and len(calls) == last)

    assert task.evaluate(divided, "validation", should_stop, ranks) is None and len(calls) == last


def main():
    with join_ranks(torch.device("cpu")) as ranks:
        text, pictures = text_task(), flow_task()
        windows = lm_task.num_windows(text.data.validation, text.config.context)
        images = len(pictures.data.validation)
        for batches in BATCHES:
            lm_task._EVAL_TOKENS = -(-windows // batches) * text.config.context
            check(text, ranks, batches, ("val_max_vio", "val_max_vio_floor", "val_specialisation"))
            image_task._EVAL_BATCH = -(-images // batches)
            check(pictures, ranks, batches, ())
        if ranks.is_main:
            print("all agree")


if __name__ == "__main__":
    main()
