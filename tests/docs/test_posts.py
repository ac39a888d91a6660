"""The pages of docs/posts: every block runs, every link and every name of the code is there, every table is current."""

import re
from pathlib import Path

import pytest
from docs.figures import NAMES
from docs.figures.results import filled

ROOT = Path(__file__).parent.parent.parent
POSTS = ROOT / "docs" / "posts"
NUMBERS = (10592, 10739, 10648, 10657, 10699, 10735, 10757, 10667, 10711, 10662)


def text_of(name: str) -> str:
    return (POSTS / f"{name}.md").read_text(encoding="utf-8")


def test_one_page_for_every_post_and_all_in_the_index():
    assert {path.stem for path in POSTS.glob("*.md")} == {*NAMES, "index"}
    index = text_of("index")
    toctree = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, re.DOTALL)
    assert toctree and toctree[1].split() == list(NAMES)
    for name, number in zip(NAMES, NUMBERS, strict=True):
        address = f"https://kexue.fm/archives/{number}"
        assert f"({name}.md) | [{number}]({address})" in index
        assert f"[{number}]({address})" in text_of(name).split("**The question.**")[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_parts(name):
    text = text_of(name)
    parts = ("**The question.**", "## The formulas", "| symbol | meaning | shape | in our code |",
             "## From formula to line of code", "## In small", "## A picture", "## Measured here",
             "**Where it did not hold.**")  # fmt: skip
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0
    assert f"](../images/posts/{name}.svg)" in text


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run(name):
    blocks = re.findall(r"```python\n(.*?)```", text_of(name), re.DOTALL)
    assert blocks and any("assert" in block for block in blocks)
    namespace: dict = {"__name__": name}
    for block in blocks:
        exec(compile(block, f"docs/posts/{name}.md", "exec"), namespace)


@pytest.mark.parametrize("name", (*NAMES, "index"))
def test_links_point_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)\)", text_of(name)):
        if not target.startswith("http"):
            assert (POSTS / target).exists(), target


@pytest.mark.parametrize("name", (*NAMES, "index"))
def test_commands_exist(name):
    text = text_of(name)
    for names in re.findall(r"`python -m benchmarks ([\w ]+)`", text):
        for benchmark in names.split():
            assert (ROOT / "benchmarks" / f"{benchmark}.py").is_file(), benchmark
    for module in re.findall(r"`python -m (docs[\w.]*)`", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_in_the_files_they_are_said_to_be_in(name):
    table = text_of(name).split("## From formula to line of code")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    files: list[Path] = []
    checked = 0
    for row in rows:
        cell = row.rsplit(" | ", 1)[1]
        files = [POSTS / target for target in re.findall(r"\]\((\.\./\.\./src/[^)]+)\)", cell)] or files
        words = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
        for found in re.findall(r"`([A-Za-z_.]+)(?:\([^`]*\))?`", cell):
            assert found.split(".")[-1] in words, (row, found)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_results_are_those_of_results_md(name):
    text = text_of(name)
    assert "<!-- results: " in text
    assert filled(text, (ROOT / "RESULTS.md").read_text(encoding="utf-8")) == text, (
        "RESULTS.md has changed: run python -m docs.figures.results, and read the words around the tables again"
    )


def test_tables_are_copied_by_name():
    results = (
        "## Claims, and what was measured\n\n| claim | source | command |\n|---|---|---|\n"
        "| a | post 1 | `one` |\n| b | post 2 | `two` |\n"
        "\n## Some section\n\n| x |\n|---|\n| 1 |\n\nwords\n\n| y |\n|---|\n| 2 |\n\n## Last\n"
    )

    def asked(what: str) -> str:
        page = filled(f"<!-- results: {what} -->\nold\n<!-- end of results -->", results)
        assert filled(page, results) == page
        return page

    assert "| b | post 2 | `two` |" in asked("claims of two three") and "| a |" not in asked("claims of two three")
    assert "| a |" in asked("claims of one:1 two:1") and "| b |" not in asked("claims of one:1 two:1")
    assert "yet: `python -m benchmarks three`" in asked("claims of three")
    assert "| 2 |" in asked("table 2 of Some section") and "| 1 |" not in asked("table 2 of Some section")
