"""Tables of RESULTS.md in README.md and in docs/posts: ``python -m docs.figures.results`` copies them again.

What is to be copied stands in the page, between two comments:

    <!-- results: claims of muon_race scale -->         rows of the table of claims, by the name of their benchmark
    <!-- results: claims of formulas:10592 -->          of these those whose source names the post
    <!-- results: table 1 of Columns and rows -->       a table of a section
    <!-- end of results -->
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "posts").glob("*.md")))
_CLAIMS = "Claims, and what was measured"
_BLOCK = re.compile(r"(<!-- results: (.*?) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)


def filled(page: str, results: str) -> str:
    """The text of a page with the tables that it asks for, from the text of RESULTS.md."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{_wanted(found[2], results)}\n\n{found[4]}", page)


def _wanted(what: str, results: str) -> str:
    if claims := re.fullmatch(r"claims of (.+)", what):
        asked = [name.partition(":") for name in claims[1].split()]
        head, line, *rows = _tables(_CLAIMS, results)[0].splitlines()
        source = head.split(" | ").index("source")
        rows = [row for row in rows if any(_is_of(row.split(" | "), source, name, post) for name, _, post in asked)]
        names = " ".join(name for name, _, _ in asked)
        nothing = f"RESULTS.md has no row of this yet: `python -m benchmarks {names}` makes them."
        return "\n".join([head, line, *rows]) if rows else nothing
    number, section = re.fullmatch(r"table (\d+) of (.+)", what).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return _tables(section, results)[int(number) - 1]


def _is_of(cells: list[str], source: int, benchmark: str, post: str) -> bool:
    return cells[-1] == f"`{benchmark}` |" and post in cells[source]


def _tables(section: str, results: str) -> list[str]:
    start = results.index(f"## {section}\n")
    text = results[start : (results + "\n## ").index("\n## ", start)]
    return [block.strip() for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def main() -> None:
    """Fill every page."""
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := filled(page, results)) != page:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
