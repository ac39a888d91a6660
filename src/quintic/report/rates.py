"""One page about an image codec: quality against the size of real files, beside the codecs that everybody has."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from quintic.codec.comparison import Rate, rates_table
from quintic.core.files import atomic_write
from quintic.report.charts import Series, line_chart
from quintic.report.figure import Figure
from quintic.report.html import Card, document, header, number_table, picture, section
from quintic.report.words import significant

__all__ = ["Example", "write_rates_report"]

_CARDS = 4


@dataclass(frozen=True)
class Example:
    """A picture, and what came back of it."""

    original: Image.Image
    coded: list[tuple[int, float, Image.Image]]
    """Bytes of the file, PSNR in dB, the decoded picture."""


def write_rates_report(folder: Path, rows: Sequence[Rate], examples: Sequence[Example]) -> Path:
    """Write ``rates.json``, ``rates.md`` and ``rates.html``.

    Args:
        folder: Made if it does not exist.
        rows: From :func:`quintic.codec.comparison.compare`; those of the first codec are the ones that matter.
        examples: Pictures to show.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "rates.json", json.dumps([asdict(row) for row in rows], indent=1))
    atomic_write(folder / "rates.md", rates_table(rows) + "\n")
    path = folder / "rates.html"
    atomic_write(path, _page(folder.absolute().name, rows, examples))
    return path


def _page(name: str, rows: Sequence[Rate], examples: Sequence[Example]) -> str:
    codecs: dict[str, list[Rate]] = {}
    for row in rows:
        codecs.setdefault(row.codec, []).append(row)
    first, *_ = codecs
    own = sorted(codecs[first], key=lambda row: row.bytes)
    pictures = own[0].pictures
    kind = f"Image codec, {pictures} picture" + ("s" if pictures > 1 else "")
    main = [
        header(kind, "Rate and distortion", _summary(codecs, own), _cards(own)),
        section("Quality against size", [_curves(codecs)]),
        _gallery(examples),
        _tables(codecs),
    ]
    return document("Rate and distortion", "\n".join(main), name)


def _summary(codecs: dict[str, list[Rate]], own: list[Rate]) -> str:
    middle = own[len(own) // 2]
    lead = f"Files of <b>{middle.bytes:.0f} bytes</b> reach <b>{middle.psnr:.1f} dB</b>."
    others = [f"{escape(name)} {_needed(rows, middle.psnr)}" for name, rows in list(codecs.items())[1:]]
    return f"{lead} For that quality {'; '.join(others)}." if others else lead


def _needed(rows: list[Rate], psnr: float) -> str:
    """Bytes at which a codec reaches a quality, on the straight line between its settings."""
    ordered = sorted(rows, key=lambda row: row.psnr)
    if psnr <= ordered[0].psnr:
        return f"needs its smallest file, {min(row.bytes for row in rows):.0f} bytes"
    if psnr > ordered[-1].psnr:
        return "needs a higher setting than was tried"
    at = np.interp(psnr, [row.psnr for row in ordered], [row.bytes for row in ordered])
    return f"needs {at:.0f} bytes"


def _cards(own: list[Rate]) -> list[Card]:
    count = min(_CARDS, len(own))
    picked = {round(i * (len(own) - 1) / max(1, count - 1)) for i in range(count)}
    return [(f"{own[i].psnr:.1f} dB", f"at {own[i].bytes:.0f} bytes", "") for i in sorted(picked)]


def _curves(codecs: dict[str, list[Rate]]) -> Figure:
    series = []
    for hue, (name, rows) in enumerate(codecs.items()):
        x, y = np.array(sorted((row.bytes, row.psnr) for row in rows), dtype=np.float64).T
        series.append(Series(name, x, y, hue=hue))
    ranges = "; ".join(
        f"{s.name} {s.y.min():.1f} to {s.y.max():.1f} dB in {s.x.min():.0f} to {s.x.max():.0f} bytes" for s in series
    )
    chart = line_chart(
        series, unit="PSNR, dB", label=f"PSNR against the size of a file: {ranges}", tall=True, x_name="bytes"
    )
    caption = "Means over the pictures. Sizes are those of whole files, headers counted; up and to the left is better."
    return Figure("PSNR by the mean size of a file", chart, caption, wide=True)


def _gallery(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    rows = []
    for number, example in enumerate(examples, 1):
        shown = [picture(_png(example.original), f"Picture {number}, the original", "original")]
        shown += [
            picture(
                _png(image),
                f"Picture {number} from a file of {size} bytes, {significant(psnr)} dB",
                f"{size} bytes, {psnr:.1f} dB",
            )
            for size, psnr, image in example.coded
        ]
        rows.append(f'<div class="images four">{"".join(shown)}</div>')
    return f"<section><h2>What comes back</h2>{''.join(rows)}</section>"


def _tables(codecs: dict[str, list[Rate]]) -> str:
    tables = []
    for name, rows in codecs.items():
        body = [(escape(row.setting), [f"{row.bytes:.1f}", f"{row.psnr:.2f}"]) for row in rows]
        tables.append(f"<div><h3>{escape(name)}</h3>{number_table(['mean bytes', 'mean dB'], body)}</div>")
    return f'<section><h2>Every setting</h2><div class="two">{"".join(tables)}</div></section>'


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
