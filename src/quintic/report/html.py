"""The frame of every page: one head, one look. It loads nothing, and tells the browser to refuse what it did not bring.

The pieces here are the same on the page of a run, of a race and of a codec evaluation: a header with a row of numbers,
sections of figures, tables, a footer.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

import quintic
from quintic.report.figure import Figure
from quintic.report.style import SCRIPT, STYLE

__all__ = ["Card", "document", "header", "number_table", "picture", "section", "table"]

Card = tuple[str, str, str]
"""A number, what it is, and a remark (or an empty string); plain text."""


def document(title: str, main: str, source: str) -> str:
    """A whole self-contained page.

    Args:
        title: Plain text.
        main: HTML of what is in it. Images must be inline.
        source: Where the records it is drawn from are; plain text for the footer.

    Example:
        >>> page = document("a < b", "<p>text</p>", "runs/a")
        >>> "<title>a &lt; b - Quintic</title>" in page, "from the records of runs/a" in page
        (True, True)
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - Quintic</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{main}
<footer>Drawn by Quintic {escape(quintic.__version__)} from the records of {escape(source)}.
The page holds everything it shows and loads nothing.</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def header(kind: str, title: str, lead: str, cards: Iterable[Card], *, state: str = "") -> str:
    """The top of a page: what it is about, the result in a sentence, the numbers people ask for first.

    Args:
        kind: Plain text above the title.
        title: Plain text.
        lead: HTML.
        cards: The first one stands out.
        state: Plain text beside the kind.
    """
    shown = f' <span class="state">{escape(state)}</span>' if state else ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="note">{escape(note)}</dd>' if note else "")
        + "</div>"
        for value, name, note in cards
    )
    return (
        f'<header><p class="kind">{escape(kind)}{shown}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{lead}</p><dl class="cards">{items}</dl></header>'
    )


def section(heading: str, figures: Iterable[Figure | None]) -> str:
    """A heading and the figures there are, two side by side where they are narrow; nothing without a figure."""
    there = [figure for figure in figures if figure is not None]
    if not there:
        return ""
    narrow = [figure for figure in there if not figure.wide]
    # An odd one would stand beside a hole.
    alone = narrow[-1] if len(narrow) % 2 else None
    items = "".join(
        f'<figure class="{"wide" if figure.wide or figure is alone else ""}"><h3>{escape(figure.title)}</h3>'
        f"{figure.body}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in there
    )
    return f'<section><h2>{escape(heading)}</h2><div class="figures">{items}</div></section>'


def picture(png: bytes, alt: str, caption: str) -> str:
    """One image of a gallery, enlarged without blur; words are plain text."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, plain text."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><tbody>{cells}</tbody></table>"


def number_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Numbers by column, scrolling sideways where they do not fit.

    Args:
        columns: Headings after the first column's; plain text.
        rows: Name and cells, HTML.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for name, cells in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table class="num">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
