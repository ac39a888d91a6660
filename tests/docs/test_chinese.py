"""The Chinese pages say the same: their commands and examples are those of the English ones, comments aside."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAIRS = {"README.md": "README.zh.md", "docs/getting-started.md": "docs/zh/getting-started.md"}


def blocks(name):
    """(language, code without comments) of every block of a page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [(kind, bare(kind, code)) for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)]


def bare(kind, code):
    if kind == "python":
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        return [t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)]
    return [re.sub(r"\s+#.*", "", line).rstrip() for line in code.splitlines()]


@pytest.mark.parametrize("english", PAIRS)
def test_the_same_commands_and_examples(english):
    assert blocks(english) and blocks(PAIRS[english]) == blocks(english)


@pytest.mark.parametrize("english", PAIRS)
def test_the_same_sections_in_the_same_order(english):
    """By level: words differ."""

    def levels(name):
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
        return re.findall(r"^(#+) ", text, re.M)

    assert levels(PAIRS[english]) == levels(english)


def test_the_table_of_methods_has_the_same_sources_and_places():
    def rows(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        return [line.split("|")[2:] for line in text.splitlines() if "kexue.fm/archives" in line]

    assert rows("README.zh.md") == rows("README.md") and len(rows("README.md")) > 10


@pytest.mark.parametrize("page", ["README.zh.md", "docs/zh/index.md", "docs/zh/getting-started.md"])
def test_links_point_somewhere_and_punctuation_is_chinese(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.M | re.S)
    assert re.findall(r"[\u4e00-\u9fff][,:;?!].{0,9}", prose) == []


def test_the_table_of_results_has_the_same_numbers():
    """Row by row; the English one is copied from RESULTS.md, see test_readme.py."""

    def rows(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        table = re.search(r"^\|[^\n]*\| benchmark \|\n(?:\|.*\n)+", text, re.M)[0]
        return [
            (sorted(re.findall(r"-?\d+(?:\.\d+)?", row)), re.findall(r"`[\w.]+`", row)) for row in table.splitlines()
        ]

    assert rows("README.zh.md") == rows("README.md") and len(rows("README.md")) > 10
