"""Models of runs in Python: what the command line loads, with the tokenizer and the names of classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.command import quintic

from quintic import load_run
from quintic.core import CheckpointError
from quintic.lm import generate_text


def test_a_language_model_with_its_tokenizer(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"the whale swam under ship {i}.\n" for i in range(300)))
    small = ("--size", "tiny", "engine.steps=2", "lm.context=32", "engine.checkpoint_every=1")
    assert quintic("train", book, *small, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert quintic("generate", tmp_path / "run", "--prompt", "the", "--max-tokens", 8, "--checkpoint", "last") == 0
    run = load_run(str(tmp_path / "run"), "last", device="cpu")
    assert (run.task, run.classes, run.settings["engine"].steps, run.model.training) == ("lm", (), 2, False)
    assert run.tokenizer is not None
    text = "".join(generate_text(run.model, run.tokenizer, "the", max_tokens=8))
    assert capsys.readouterr().out == f"the{text}\n"
    earlier = load_run(tmp_path / "run", "1", device="cpu", dtype="float64").model
    assert {p.dtype for p in earlier.parameters()} == {torch.float64}
    assert any(
        not torch.equal(p, q.double()) for p, q in zip(earlier.parameters(), run.model.parameters(), strict=True)
    )
    with pytest.raises(CheckpointError, match="expected best, last or one of the saved steps: 1, 2"):
        load_run(tmp_path / "run", "3")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_run(tmp_path / "nothing")


def test_a_flow_with_the_names_of_its_classes(tmp_path):
    for number, name in enumerate(("round", "square")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(10 * number + i).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    settings = ("--task", "tarflow", "--size", "tiny", "engine.steps=1", "data.size=8", "tarflow.classes=-1")
    assert quintic("train", tmp_path / "pictures", *settings, "--out", tmp_path / "run") == 0
    run = load_run(tmp_path / "run", device="cpu")
    assert (run.task, run.classes, run.tokenizer) == ("tarflow", ("round", "square"), None)
    assert run.model.sample(1, run.classes.index("square")).images.shape == (1, 1, 8, 8)
