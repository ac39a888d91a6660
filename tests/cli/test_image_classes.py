"""Classes of a run are found by their names, whatever folders pictures lie in; what cannot be so is said."""

import json
import re
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.command import quintic

from quintic.cli.image_classes import class_number, give_classes
from quintic.core import ConfigError, DataError
from quintic.data.images import ImageConfig, as_signed, prepare_images

NAMES = ["disc", "ring", "square"]


@dataclass
class Config:
    classes: int = 3
    class_dropout: float = 0.1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for i in range(8):
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{name}{i}.png")
    return folder


def read(*paths):
    return prepare_images(list(paths), ImageConfig(validation_fraction=0.0, test_fraction=1.0))


def renamed(pictures, to, **names):
    for old, new in names.items():
        shutil.copytree(pictures / old, to / new)
    return to


def test_labels_are_those_of_the_names_whatever_the_alphabet_makes_of_the_folders(pictures, tmp_path):
    for folders, numbers in (({"square": "square", "ring": "ring"}, [1, 2]), ({"square": "square"}, [2])):
        given, words = give_classes(
            read(renamed(pictures, tmp_path / "-".join(folders), **folders)), Config(), NAMES, None
        )
        assert sorted(set(given.test.labels)) == numbers and given.class_names == tuple(NAMES)
        assert all(NAMES[label] in file for label, file in zip(given.test.labels, given.test.files, strict=True))
        assert words == f", each given its class ({len(numbers)} of 3)"
    # Folders that are named themselves are classes too.
    given, _ = give_classes(read(pictures / "square", pictures / "disc"), Config(), NAMES, None)
    assert all(NAMES[label] in file for label, file in zip(given.test.labels, given.test.files, strict=True))
    assert sorted(set(given.test.labels)) == [0, 2]


def test_names_that_the_model_does_not_know_are_an_error_that_lists_those_it_does(pictures, tmp_path):
    others = read(renamed(pictures, tmp_path, disc="cats", ring="dogs", square="ring"))
    with pytest.raises(DataError, match=r"knows no class cats, dogs; it knows: disc, ring, square\. .* --class -1"):
        give_classes(others, Config(), NAMES, None)
    given, words = give_classes(others, Config(), NAMES, "square")
    assert set(given.test.labels) == {2} and words == ", all given the class square"
    assert give_classes(others, Config(), NAMES, "-1")[0].test.labels is None
    # A model whose classes have numbers alone, as those of the package: by those, or without.
    given, words = give_classes(others, Config(), [], None)
    assert given.test.labels is None and "without a class (those of the model have no names" in words
    given, _ = give_classes(read(renamed(pictures, tmp_path / "n", disc="2", ring="0")), Config(), [], None)
    assert set(given.test.labels) == {0, 2}


def test_pictures_in_no_folders_have_no_class_if_the_model_can_do_without(pictures, tmp_path):
    for name in NAMES:
        shutil.copy(pictures / name / f"{name}0.png", tmp_path)
    given, words = give_classes(read(tmp_path), Config(), NAMES, None)
    assert given.test.labels is None and words == ", without a class (they are in no folders of classes)"
    with pytest.raises(DataError, match=r"no image without its class \(class_dropout=0\)"):
        give_classes(read(tmp_path), Config(class_dropout=0.0), NAMES, None)
    with pytest.raises(DataError, match="class_dropout=0"):
        give_classes(read(pictures), Config(class_dropout=0.0), NAMES, "-1")
    given, words = give_classes(read(pictures), Config(classes=0), [], None)
    assert given.test.labels is None and words == ""


def test_a_class_has_a_name_and_a_number():
    assert [class_number(label, 3, NAMES) for label in ("ring", "1", "-1")] == [1, 1, -1]
    for wrong in ("rings", "3", "-2", "1.0"):
        with pytest.raises(ConfigError, match=rf"--class must be a name or 0 to 2, or -1 for none, found {wrong}"):
            class_number(wrong, 3, NAMES)
    with pytest.raises(ConfigError, match="trained without"):
        class_number("0", 0, [])


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    sizes = ["ddpm.classes=-1", "ddpm.width=8", "ddpm.heads=0", "ddpm.sample_images=1", "ddpm.sample_steps=2"]
    steps = [
        "engine.steps=30",
        "engine.batch_size=16",
        "engine.eval_every=30",
        "engine.checkpoint_every=30",
        "optim.lr=0.05",
    ]
    given = ["--task", "ddpm", "--size", "tiny", pictures, "--out", out, *sizes, *steps]
    assert quintic("train", *given, "data.size=8", "data.validation_fraction=0", "data.test_fraction=0.3") == 0
    return out


def loss(capsys, run, *arguments):
    capsys.readouterr()
    assert quintic("evaluate", run, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_diffusion_model_is_evaluated_with_classes_by_name(run, pictures, tmp_path, capsys):
    from quintic.cli.wiring import load_run_model
    from quintic.core.counter_rng import Stream
    from quintic.diffusion.task import DDPMTask

    loaded = load_run_model(run, "best", "cpu", None)
    squares = read(pictures / "square").test
    task = DDPMTask(loaded.settings["ddpm"], read(pictures))
    batch = {"images": task.pixels(squares.images)}
    assert np.array_equal(batch["images"].numpy(), as_signed(squares.images))
    expected = {}
    for label in (1, 2, None):
        told = {} if label is None else {"labels": torch.full((len(squares),), label)}
        with torch.no_grad():
            of_all = task.evaluation_loss(loaded.model, batch | told, Stream(0, "evaluation noise", "test"), 0)
        expected[label] = float(of_all.total) / of_all.count
    alone = renamed(pictures, tmp_path / "alone", square="square")
    found = loss(capsys, run, alone)
    assert len({round(value, 5) for value in expected.values()}) == 3
    assert found["loss"] == pytest.approx(expected[2], rel=1e-6)
    assert loss(capsys, run, pictures / "square")["loss"] == found["loss"]
    assert found["classes"] == ["square"] * 8
    assert loss(capsys, run, alone, "--class", "ring")["loss"] == pytest.approx(expected[1], rel=1e-6)
    without = loss(capsys, run, alone, "--class", "-1")
    assert without["loss"] == pytest.approx(expected[None], rel=1e-6) and "classes" not in without
    assert quintic("evaluate", run) == 0
    assert re.search(r"test split of .*run, each given its class: loss", capsys.readouterr().out)
    assert quintic("evaluate", run, "--class", "ring") == 2
    assert "--class is of pictures that are named" in capsys.readouterr().err
    assert quintic("evaluate", run, renamed(pictures, tmp_path / "o", ring="dogs")) == 2
    assert "knows no class dogs; it knows: disc, ring, square" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_read_is_left_out_of_an_evaluation_and_told_at_its_end(run, pictures, tmp_path, capsys):
    folder = renamed(pictures, tmp_path, ring="ring")
    (folder / "ring" / "broken.png").write_bytes(b"nothing")
    whole, found = loss(capsys, run, pictures / "ring"), loss(capsys, run, folder)
    assert found["images"] == 8 and found["loss"] == whole["loss"] and "left_out" not in whole
    (problem,) = found["left_out"]
    assert "broken.png" in problem
    assert quintic("evaluate", run, folder) == 0
    lines = "".join(capsys.readouterr().out.splitlines())
    assert re.search(r"8 images.*left out: cannot read .*broken\.png", lines)


def test_a_diffusion_model_draws_a_class_by_name_with_guidance(run, tmp_path, capsys):
    def drawn(*options):
        assert (
            quintic("generate", run, "--n", "3", "--steps", "3", *options, "--out", tmp_path / "x.png", "--overwrite")
            == 0
        )
        return np.load(tmp_path / "x.npy")

    free, ring = drawn(), drawn("--class", "ring")
    assert np.array_equal(drawn("--class", "-1"), free) and np.array_equal(drawn("--class", "1"), ring)
    assert not np.array_equal(ring, free)
    assert not np.array_equal(drawn("--class", "ring", "--guidance", "3"), ring)
    for options in ((), ("--class", "-1")):
        assert quintic("generate", run, "--guidance", "2", *options) == 2
        assert "--guidance needs a class to go to: --class NAME" in capsys.readouterr().err
    assert quintic("generate", run, "--class", "ring", "--guidance", "-1") == 2
    assert "guidance weight must be 0 or more" in capsys.readouterr().err
