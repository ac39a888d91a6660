"""What is said to somebody who writes a thing in another way than it is meant here."""

import pytest
from tests.cli.command import quintic


def told(capsys, *arguments):
    assert quintic(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_setting_with_dashes_is_not_taken_for_an_option_that_looks_like_it(capsys):
    words = told(capsys, "train", "--steps", "5")
    assert "Unknown option: --steps" in words and "settings have no dashes: engine.steps=..." in words
    assert "Did you mean" not in words
    assert "Did you mean --size" in told(capsys, "train", "--sizee", "tiny")


def test_a_prompt_without_its_option(capsys):
    assert 'generate RUN --prompt "..."' in told(capsys, "generate", "runs/book", "Call me")


@pytest.mark.parametrize("verb", [["train"], ["evaluate", "runs/book"], ["race", "--out", "runs/r"]])
def test_an_address_is_no_file(capsys, verb):
    for address in ("https://example.com/book.txt", "https://example.com/?book=1"):
        assert f"{address} is an address, from which nothing is read" in told(capsys, *verb, address)
