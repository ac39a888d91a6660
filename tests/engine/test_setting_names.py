"""Names that other programs use find the settings of this one, and only settings that there are."""

from collections import Counter

import pytest

from quintic.cli.wiring import KINDS, section_types
from quintic.engine.config import known_settings
from quintic.engine.setting_names import ELSEWHERE, did_you_mean, meant

KNOWN = {task: known_settings(section_types(task)) for task in KINDS}
FIELDS = {key.partition(".")[2] for known in KNOWN.values() for key in known}


def test_the_table_is_of_settings_and_unambiguous():
    assert set(ELSEWHERE) <= FIELDS
    others = Counter(other for names in ELSEWHERE.values() for other in names)
    assert max(others.values()) == 1


@pytest.mark.parametrize(
    ("task", "name", "setting"),
    [
        ("lm", "optim.wd", "optim.weight_decay"),
        ("lm", "optim.warmup_steps", "optim.warmup_fraction"),
        ("lm", "data.seq_len", "lm.context"),
        ("lm", "engine.lr", "optim.lr"),  # the field is right, the section is not
        ("lm", "n_layers", "lm.num_layers"),
        ("lm", "--Batch-Size", "engine.batch_size"),
        ("lm", "optim.momentun", "optim.momentum"),
        ("lm", "lm.checkpoint_every", "engine.checkpoint_every"),
        ("tarflow", "width", "tarflow.width"),
        ("tarflow", "data.channels", "data.channels"),  # two sections have it: the one that was said
        ("tarflow", "tarflow.channel", "tarflow.channels"),
        ("ddpm", "image_size", "data.size"),
        ("ddpm", "hidden_size", None),  # a network of another kind has nothing of the sort
        ("lm", "colour", None),
    ],
)
def test_what_is_meant(task, name, setting):
    assert meant(name, KNOWN[task]) == setting


def test_what_is_far_from_all_names_the_choices():
    told = did_you_mean("optim.colour", KNOWN["lm"])
    assert told.startswith("; optim has ") and "weight_decay" in told and "context" not in told
    assert "sections data, engine, lm, optim" in did_you_mean("model.colour", KNOWN["lm"])
