"""Every example runs, in fewer steps than it has by itself, and what its docstring promises is in its output."""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(capsys):
    def call(name: str, *words: str) -> str:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(list(words))
        return capsys.readouterr().out

    return call


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_tested_and_says_what_one_sees():
    source = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(names) == 5
    for name in names:
        assert f'run("{name}"' in source, name
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert "One\nsees" in text or "One sees" in text, name
        assert f"python examples/{name}.py" in text, name


def test_muon_is_ahead_of_adamw(run):
    text = run("muon_in_a_plain_loop", "--steps", "100")
    adamw, muon = numbers(r"validation loss ([\d.]+)", text)
    assert muon < adamw - 0.1
    assert numbers(r"after (\d+) % of the steps", text)[0] <= 60
    assert re.search(r"4\.weight .* head +adamw", text)


def test_loss_free_balance_brings_max_vio_down(run):
    text = run("moe_in_a_transformer", "--steps", "60")
    (floor,) = numbers(r"alone: MaxVio ([\d.]+)", text)
    unbalanced, balanced = numbers(r"last tenth: MaxVio ([\d.]+)", text)
    worse, loss = numbers(r"loss ([\d.]+)", text)
    assert balanced < 0.5 * unbalanced and balanced < 3 * floor
    assert abs(loss - worse) < 0.15


def test_flow_learns_digits_and_inverts(run, tmp_path):
    text = run("tarflow_on_digits", "--steps", "60", "--out", str(tmp_path))
    likelihoods, (bound,) = numbers(r"likelihood +(-?[\d.]+) nats", text), numbers(r"noise: (-?[\d.]+)", text)
    assert likelihoods[-1] > likelihoods[0] + 0.5 and max(likelihoods) < bound
    assert numbers(r"(\d+)% named", text)[-1] >= 20
    assert numbers(r"at most (\S+)", text)[0] < 1e-4
    assert Image.open(tmp_path / "digits.png").size == (600, 600)


def test_codec_keeps_the_budget_and_beats_jpeg(run, tmp_path):
    text = run("image_codec", "--out", str(tmp_path), "--budgets", "60", "120")
    sizes, decibels = (
        numbers(r"^ *(\d+) bytes  ", text) + numbers(r"\n *(\d+) bytes  ", text),
        numbers(r"([\d.]+) dB\n", text),
    )
    assert sizes[0] <= 60 < sizes[1] <= 120
    jpeg_bytes, jpeg = numbers(r"quality: (\d+) bytes", text)[0], decibels[-1]
    assert decibels[0] < decibels[1] and jpeg_bytes > 120 and decibels[0] > jpeg
    assert Image.open(tmp_path / "decoded-60.png").size == (28, 28)


def test_cur_names_rows_and_columns_of_the_table(run):
    text = run("cur_of_a_table", "--rank", "4")
    words, chapters = (re.search(rf"{what}: +(.*)", text) for what in ("words", "chapters"))
    assert words and chapters and len(words[1].split(", ")) == 4 and len(chapters[1].split("; ")) == 4
    error, chance, least = numbers(r"(0\.\d+)", text)
    assert least < error < chance
