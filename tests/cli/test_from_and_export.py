"""Models that come from elsewhere and go elsewhere: export, import, train --from, verify-resume."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.command import quintic

from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.metrics import read_metrics

SMALL = ["--size", "tiny", "engine.eval_every=4", "optim.lr=0.01"]
TEXT = "the whale swam under the ship and the captain looked at the sea.\n" * 60


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert quintic("train", book, *SMALL, "engine.steps=12", "lm.num_experts=6", "--out", folder) == 0
    return folder


def last_weights(run):
    return load_file(list(list_checkpoints(run / "checkpoints").values())[-1] / "model.safetensors")


def test_the_exported_folder_speaks_as_the_run_does(run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    assert quintic("export", run, tmp_path / "hf") == 0
    assert "DeepSeek-V3 for transformers" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompt = tokenizer("the wha", return_tensors="pt")  # behind the token that begins a document
    made = model.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    several = tokenizer(["the wha", "the"], padding=True)  # padding is masked, whatever token stands there
    assert several["attention_mask"][1].count(0) and tokenizer.pad_token_id == tokenizer.eos_token_id
    greedy = ("--temperature", "0", "--max-tokens", "40", "--dtype", "float32")
    assert quintic("generate", run, "--prompt", "the wha", *greedy) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(made[0, 1:])
    assert quintic("export", run, tmp_path / "hf") == 2
    assert "exists already" in capsys.readouterr().err


def test_the_page_s_example_writes_what_generate_writes(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    page = Path(__file__).parents[2] / "docs" / "howto" / "hugging-face.md"
    example = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    assert quintic("export", run, tmp_path / "exported") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(example, str(page), "exec"), {})
    theirs = capsys.readouterr().out
    assert quintic("generate", run, "--prompt", "It was", "--max-tokens", "20", "--temperature", "0") == 0
    assert capsys.readouterr().out == theirs and len(theirs) > 20


def test_an_imported_folder_generates_evaluates_and_trains_on(run, book, tmp_path, capsys):
    assert quintic("export", run, tmp_path / "hf") == 0
    assert quintic("import", tmp_path / "hf", "--out", tmp_path / "imported") == 0
    capsys.readouterr()
    texts, losses = [], []
    for folder in (run, tmp_path / "imported"):
        assert quintic("generate", folder, "--prompt", "the ", "--max-tokens", "30") == 0
        texts.append(capsys.readouterr().out)
        assert quintic("evaluate", folder, book) == 0
        losses.append(capsys.readouterr().out.partition("loss ")[2])
    assert texts[0] == texts[1] and losses[0] == losses[1]
    assert quintic("resume", tmp_path / "imported") == 2
    assert "was imported, not trained" in capsys.readouterr().err
    assert quintic("evaluate", tmp_path / "imported") == 2
    assert "was imported without text; name the text" in " ".join(capsys.readouterr().err.split())
    # The weights are as readable as all else in the folder.
    assert len({path.stat().st_mode & 0o777 for path in (tmp_path / "imported").iterdir()}) == 1


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_training_from_another_model_starts_where_it_ended(run, book, tmp_path, kind, capsys):
    origin = run
    if kind == "hf":
        assert quintic("export", run, tmp_path / "hf") == 0
        origin = tmp_path / "hf"
    new = tmp_path / "new"
    assert quintic("train", book, *SMALL, "engine.steps=4", "--from", origin, "--out", new) == 0
    config = (new / "config.toml").read_text()
    assert f"num_experts = 6  # from {origin}" in config and "tokenizer.json" in config
    first, before = read_metrics(new / "metrics.jsonl")[0], read_metrics(run / "metrics.jsonl")
    assert first["loss"] == pytest.approx(before[-1]["loss"], abs=0.3) and before[0]["loss"] > first["loss"] + 1.0
    start = load_file(new / "initial.safetensors")
    assert all(torch.equal(tensor, start[name]) for name, tensor in last_weights(run).items())
    # Killed before its first checkpoint, it starts from the same weights again.
    for path in [*(new / "checkpoints").iterdir(), new / "metrics.jsonl"]:
        path.rename(tmp_path / path.name)
    assert quintic("resume", new) == 0
    assert read_metrics(new / "metrics.jsonl")[0]["loss"] == first["loss"]
    whole = load_file(next(tmp_path.glob("step-4")) / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in last_weights(new).items())


def test_what_does_not_fit_is_named_and_nothing_is_written(run, book, tmp_path, capsys):
    out = tmp_path / "new"
    assert quintic("train", book, *SMALL, "--from", run, "lm.d_ff=96", "--out", out) == 2
    assert "blocks.0.ffn.down is (64, 128) there and (64, 96) here" in " ".join(capsys.readouterr().err.split())
    assert quintic("train", book, *SMALL, "--from", tmp_path, "--out", out) == 2
    assert "neither a run" in capsys.readouterr().err
    assert quintic("import", tmp_path, "--out", out) == 2
    capsys.readouterr()
    for words in (("import", out / "nowhere"), ("train", book, *SMALL, "--from", out / "nowhere")):
        assert quintic(*words, "--out", out) == 2
        assert "there is no folder" in capsys.readouterr().err
    assert not out.exists()


def test_verify_resume(run, capsys):
    before = sorted(path.name for path in run.iterdir())
    assert quintic("verify-resume", run) == 0
    assert "exact: 6 steps equal 3 steps" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == before
    assert quintic("verify-resume", run, "--cut", "9") == 2
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_model_without_a_tokenizer_is_refused(run, book, tmp_path, capsys):
    assert quintic("export", run, tmp_path / "hf") == 0
    (tmp_path / "hf" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for words in (("train", book, *SMALL, "--from", tmp_path / "hf"), ("import", tmp_path / "hf")):
        assert quintic(*words, "--out", tmp_path / "new") == 2
        assert "has no tokenizer.json" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
    given = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    words = ("train", book, *SMALL, "--from", tmp_path / "hf", given, "engine.steps=1", "--out", tmp_path / "new")
    assert quintic(*words) == 0


def test_verify_resume_starts_where_the_run_started(run, book, tmp_path, capsys, monkeypatch):
    """From the weights of another model, if the run did; what was never trained has nothing to prove."""
    from quintic.engine import verification

    new = tmp_path / "new"
    assert quintic("train", book, *SMALL, "engine.steps=4", "--from", run, "--out", new) == 0
    first = []
    plain = verification.differences
    monkeypatch.setattr(
        verification, "differences", lambda *runs: first.append(read_metrics(runs[0].metrics_file)[0]) or plain(*runs)
    )
    assert quintic("verify-resume", new, "--steps", "2", "--cut", "1") == 0
    assert first[0]["loss"] == read_metrics(new / "metrics.jsonl")[0]["loss"]
    assert quintic("export", run, tmp_path / "hf") == 0
    assert quintic("import", tmp_path / "hf", "--out", tmp_path / "imported") == 0
    assert quintic("verify-resume", tmp_path / "imported") == 2
    assert "was imported, not trained" in capsys.readouterr().err


def test_a_model_is_compared_on_the_test_split_of_another_run(run, book, tmp_path, capsys):
    """Fine-tuned without a change of weights, it is as good as before on the same part of the text."""
    other, tuned = tmp_path / "other.txt", tmp_path / "tuned"
    other.write_text(book.read_text() + "and the sea was calm, and nobody looked.\n" * 40)
    assert quintic("train", other, "--from", run, "--out", tuned, "engine.steps=1", "optim.lr=1e-12") == 0
    capsys.readouterr()
    found = []
    for arguments in ([tuned], [run, other, "data.test_fraction=0.05"], [run, other]):
        assert quintic("evaluate", *arguments, "--json") == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[1]["bytes"] == found[0]["bytes"] < found[2]["bytes"] / 15
    assert found[1]["bits_per_byte"] == pytest.approx(found[0]["bits_per_byte"], rel=1e-2)
    assert found[2]["bits_per_byte"] != pytest.approx(found[0]["bits_per_byte"], rel=1e-2)
    assert found[1]["data"] == f"last 5 % of {other}"
