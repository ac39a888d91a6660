"""``quintic matrix compress``: the run folder it makes is one for every other verb."""

import json
import random
import re

import pytest
from safetensors.torch import load_file
from tests.cli.command import quintic

from quintic.cli.matrix import _explained
from quintic.engine.metrics import read_metrics

SMALL = ["--size", "tiny", "engine.eval_every=20", "optim.lr=0.02"]
WORDS = "the whale swam under ship and captain looked at sea while all hands sang of an island in rain"
TEXT = " ".join(random.Random(0).choices(WORDS.split(), k=1500)) + "\n"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert quintic("train", book, *SMALL, "engine.steps=40", "lm.num_experts=4", "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def half(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "half"
    assert quintic("matrix", "compress", run, "--keep", "0.5", "--tokens", "2000", "--out", folder) == 0
    return folder


def bits(text):
    return float(re.search(r"([\d.]+) bits per byte", text)[1])


def test_the_table_says_what_was_done(run, tmp_path, capsys):
    capsys.readouterr()
    assert quintic("matrix", "compress", run, "--keep", "0.75", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    for name, neurons in (("blocks.0.ffn", "128 -> 96"), ("blocks.1.ffn.experts", "4 x 32 -> 24")):
        assert re.search(rf"^{re.escape(name)} +{neurons} +[\d,]+ -> [\d,]+ +0\.\d+ +0\.\d+ *$", out, re.M)
    old, new = (sum(t.numel() for t in load_file(path).values()) for path in weights(run, tmp_path / "out"))
    # The state holds the routers' biases too, which are no parameters.
    routers = 2 * 4
    assert f"parameters: {old - routers:,} -> {new - routers:,}; weights {4 * (old - routers):,} ->" in out
    before, after = map(float, re.search(r"validation: ([\d.]+) -> ([\d.]+) bits per byte", out).groups())
    for folder, value in ((run, before), (tmp_path / "out", after)):
        assert quintic("evaluate", folder, "--split", "validation") == 0
        assert bits(capsys.readouterr().out) == pytest.approx(value, abs=1e-4)


def weights(run, compressed):
    (best,) = {path for path in run.glob("checkpoints/*/model.safetensors") if path.parent.name == "step-40"}
    return best, compressed / "initial.safetensors"


def test_more_neurons_lose_less_and_chance_loses_more(run, tmp_path):
    found = {}
    for keep, rule in (("0.9", "quality"), ("0.3", "quality"), ("0.3", "uniform")):
        folder = tmp_path / f"{keep}-{rule}"
        assert quintic("matrix", "compress", run, "--keep", keep, "--rule", rule, "--out", folder) == 0
        before, found[keep, rule] = json.loads((folder / "run.json").read_text())["val_bits_per_byte"]
    assert found["0.9", "quality"] < before + 0.05 and found["0.9", "quality"] < found["0.3", "quality"]
    assert found["0.3", "quality"] < found["0.3", "uniform"]


def test_the_folder_is_a_run_for_the_other_verbs(half, book, tmp_path, capsys):
    config = (half / "config.toml").read_text()
    assert "d_ff = 64  # compressed from" in config and "d_expert = 16  # compressed from" in config
    capsys.readouterr()
    assert quintic("generate", half, "--prompt", "the ", "--max-tokens", "20") == 0
    assert capsys.readouterr().out.startswith("the ")
    assert quintic("evaluate", half, book) == 0
    assert bits(capsys.readouterr().out) > 0
    assert quintic("export", half, tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["moe_intermediate_size"] == 16
    assert quintic("matrix", "compress", half, "--out", tmp_path / "quarter") == 0
    assert "d_expert = 8 " in (tmp_path / "quarter" / "config.toml").read_text()


def test_training_goes_on_from_it(half, book, tmp_path):
    assert quintic("train", book, *SMALL, "engine.steps=10", "--from", half, "--out", tmp_path / "more") == 0
    assert "d_expert = 16  # from" in (tmp_path / "more" / "config.toml").read_text()
    _, after = json.loads((half / "run.json").read_text())["val_bits_per_byte"]
    assert read_metrics(tmp_path / "more" / "metrics.jsonl")[-1]["val_bits_per_byte"] < after


def test_too_little_text_is_said_once(run, tmp_path, capsys, recwarn):
    assert quintic("matrix", "compress", run, "--tokens", "64", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert not any("calibration data" in str(warning.message) for warning in recwarn)
    assert "warning: blocks.0.ffn saw 64 tokens and has 128 neurons; raise --tokens" in out
    assert "warning: an expert of blocks.1.ffn.experts saw " in out


def test_imported_models_need_text(run, book, tmp_path, capsys):
    assert quintic("export", run, tmp_path / "hf") == 0
    assert quintic("import", tmp_path / "hf", "--out", tmp_path / "imported") == 0
    assert quintic("matrix", "compress", tmp_path / "imported", "--out", tmp_path / "out") == 2
    assert "was imported without text" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert quintic("matrix", "compress", tmp_path / "imported", book, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert quintic("evaluate", tmp_path / "out", "--split", "validation") == 0  # the text is now the run's own
    _, after = json.loads((tmp_path / "out" / "run.json").read_text())["val_bits_per_byte"]
    assert bits(capsys.readouterr().out) == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "1"], "expected a share of the neurons, above 0 and below 1"),
        (["--tokens", "0"], "--tokens 0: expected at least 1"),
        (["--rule", "qualty"], "did you mean 'quality'"),
        (["--checkpoint", "7"], "no checkpoint '7'"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(run, tmp_path, capsys, arguments, message):
    assert quintic("matrix", "compress", run, *arguments, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_a_folder_in_use_and_changed_text_are_refused(run, half, tmp_path, capsys):
    assert quintic("matrix", "compress", run, "--out", half) == 2
    assert "holds a run already" in capsys.readouterr().err
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    assert quintic("train", book, *SMALL, "engine.steps=1", "--out", tmp_path / "short") == 0
    book.write_text(TEXT + "and so on")
    assert quintic("matrix", "compress", tmp_path / "short", "--out", tmp_path / "out") == 2
    assert "has changed since it was trained" in " ".join(capsys.readouterr().err.split())


def test_a_hundred_percent_is_said_of_nothing_less():
    assert _explained(0.0) == "100.00%" and _explained(1e-5) == "more than 99.99%" and _explained(0.1) == "99.00%"
