"""What ``quintic generate`` writes: to a terminal, into a file, and behind any prompt."""

import sys

import pytest
from tests.cli.command import quintic

from quintic.data import Tokenizer
from quintic.lm import LanguageModel, LMConfig, save_deepseek

LIKELY = ("--temperature", "1", "--top-p", "1", "--max-tokens", "150")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of bytes that has learned nothing, so that it writes all of them."""
    folder = tmp_path_factory.mktemp("bytes")
    save_deepseek(LanguageModel(LMConfig(), seed=0), folder / "hf", Tokenizer.bytes())
    assert quintic("import", folder / "hf", "--out", folder / "run") == 0
    return folder / "run"


def test_a_terminal_is_shown_control_characters_and_a_file_gets_them(run, capsys, monkeypatch):
    command = ("generate", run, "--prompt", "a\x1b[31m\x07\tb\n", *LIKELY)
    capsys.readouterr()
    assert quintic(*command) == 0
    exact = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert quintic(*command) == 0
    shown = capsys.readouterr().out
    controls = [c for c in exact if not c.isprintable() and c not in "\n\t"]
    assert exact.startswith("a\x1b[31m\x07\tb\n") and len(set(controls)) > 5
    assert shown.startswith("a␛[31m␇\tb\n") and len(shown) == len(exact)
    assert all(old == new for old, new in zip(exact, shown, strict=True) if old not in controls)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown if c not in "\n\t")


@pytest.mark.parametrize("prompt", ["- Hello", "-- said he", "-1", "--prompt"])
def test_prompts_and_stops_may_begin_with_a_hyphen(run, prompt, capsys):
    assert quintic("generate", run, "--prompt", prompt, "--max-tokens", "0") == 0
    assert capsys.readouterr().out == f"{prompt}\n"
    assert quintic("generate", run, "--max-tokens", "150", "--stop", prompt[:1], "--stop", "-x") == 0
    assert "-" not in capsys.readouterr().out
