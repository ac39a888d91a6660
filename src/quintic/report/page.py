"""The page: sections in the order in which a person asks. How good, how it got there, what it makes, on what.

One HTML file that loads nothing: style, script, charts and images are inside, and its content policy tells the
browser to refuse anything else, scripts that are not ours included.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import quintic
from quintic.core.files import atomic_write
from quintic.report.curves import bits_figure, gradient_figure, loss_figure, rate_figure, speed_figure
from quintic.report.experts import balance_figure, load_figure
from quintic.report.figure import Figure
from quintic.report.html import document
from quintic.report.records import Records, read_records
from quintic.report.spectra import spectra_figure
from quintic.report.style import SCRIPT
from quintic.report.words import count, duration, plain, significant

__all__ = ["render", "write_report"]

_KINDS = {"lm": "Language model", "tarflow": "TARFLOW image model", "ddpm": "Diffusion image model"}
_SAMPLES = 6
_SAMPLE_CHARACTERS = 4000
_MACHINE = {
    "cpu": ("Processor", "{}"),
    "threads": ("Threads", "{}"),
    "device": ("Device", "{}"),
    "dtype": ("Precision", "{}"),
    "matmul_gflops": ("Matrix product", "{} GFLOP/s, measured"),
    "peak_memory_mb": ("Peak memory", "{} MiB"),
    "platform": ("System", "{}"),
    "python": ("Python", "{}"),
    "torch": ("PyTorch", "{}"),
}


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from the records in it; the run may still be training.

    Args:
        run_folder: A folder made by ``quintic train``.

    Returns:
        The page's path.

    Raises:
        CheckpointError: The folder holds no run, or a record is damaged.
        DataError: The run has not taken a step yet.
    """
    path = Path(run_folder) / "report.html"
    atomic_write(path, render(read_records(Path(run_folder))))
    return path


def render(records: Records) -> str:
    """The page as text."""
    title = _title(records)
    body = "\n".join(
        [
            _header(records, title),
            _figures("How it learned", records, (bits_figure,)),
            _samples(records),
            _figures(
                "Optimization", records, (loss_figure, rate_figure, gradient_figure, speed_figure, spectra_figure)
            ),
            _figures("Experts", records, (balance_figure, load_figure)),
            _facts(records),
            _config(records),
        ]
    )
    footer = (
        f"<footer>Drawn by Quintic {escape(quintic.__version__)} from the records of {escape(records.folder.name)}.\n"
        "The page holds everything it shows and loads nothing.</footer>"
    )
    return document(title, f"{body}\n{footer}", SCRIPT)


def _title(records: Records) -> str:
    return str(records.run.get("title") or records.folder.absolute().name)


def _header(records: Records, title: str) -> str:
    run = records.run
    kind = _KINDS.get(str(run.get("task")), str(run.get("task", "Training run")))
    size = f", size {run['size']}" if run.get("size") else ""
    state = str(run.get("status", ""))
    if state == "stopped":
        state = f"stopped at step {records.step:,}"
    shown = f' <span class="state">{escape(state)}</span>' if state else ""
    return (
        f'<header><p class="kind">{escape(kind + size)}{shown}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{_summary(records)}</p>{_cards(records)}</header>'
    )


def _summary(records: Records) -> str:
    """One or two sentences, as HTML."""
    took = f"{records.step:,} steps"
    if (seconds := records.last("seconds")) is not None:
        took += f" in {duration(seconds)}"
    if cpu := records.machine.get("cpu"):
        device = str(records.machine.get("device", "cpu"))
        took += f" on {escape(str(cpu) if device == 'cpu' else device)}"
    bits, loss = records.last("val_bits_per_byte"), records.last("val_loss")
    if bits is not None:
        result = f"On text it never saw it needs <b>{bits:.3f} bits per byte</b>; raw text takes 8."
    elif loss is not None:
        result = f"On data it never saw its loss is <b>{significant(loss, 4)}</b>."
    else:
        result = "It was not validated yet."
    return f"{took}. {result}"


def _cards(records: Records) -> str:
    run = records.run
    things = records.things
    cards: list[tuple[str, str, str]] = []

    def best(key: str, digits: int) -> str:
        found = records.best(key)
        if found is None or found[0] == records.step:
            return "the best of the run" if found else ""
        return f"best {found[1]:.{digits}f} at step {found[0]:,}"

    if (bits := records.last("val_bits_per_byte")) is not None:
        cards.append((f"{bits:.3f}", "validation bits per byte", best("val_bits_per_byte", 3)))
    if (loss := records.last("val_loss")) is not None:
        cards.append((f"{loss:.3f}", "validation loss", "" if cards else best("val_loss", 3)))
    planned = records.config.get("engine", {}).get("steps")
    ahead = f"of {planned:,}" if isinstance(planned, int) and planned > records.step else ""
    cards.append((f"{records.step:,}", "optimizer steps", ahead))
    if (tokens := records.last("tokens")) is not None:
        cards.append((count(tokens), f"{things} trained on", _passes(run, tokens)))
    if (seconds := records.last("seconds")) is not None:
        cards.append((duration(seconds), "training time", "without validation"))
    if (speed := records.median("tokens_per_second")) is not None:
        cards.append((count(speed), f"{things} a second", "in a typical step"))
    total, active = run.get("parameters_total"), run.get("parameters_active")
    if isinstance(total, int):
        note = f"{count(active)} work on a token" if isinstance(active, int) and active != total else ""
        cards.append((count(total), "parameters", note))
    if isinstance(memory := records.machine.get("peak_memory_mb"), int | float):
        cards.append((f"{memory:,.0f} MiB", "peak memory", ""))
    items = "".join(
        f"<div><dd>{value}</dd><dt>{name}</dt>" + (f"<dt><small>{note}</small></dt>" if note else "") + "</div>"
        for value, name, note in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _passes(run: Mapping[str, Any], tokens: float) -> str:
    """How often the training data was gone through, where its size is recorded."""
    data = run.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    size = train.get("tokens") if isinstance(train, Mapping) else None
    return f"{tokens / size:.1f} passes over the data" if isinstance(size, int) and size > 0 else ""


def _figures(heading: str, records: Records, makers: Sequence[Callable[[Records], Figure | None]]) -> str:
    figures = [figure for make in makers if (figure := make(records)) is not None]
    if not figures:
        return ""
    lone = len(figures) == 1
    items = "".join(
        f'<figure class="{"wide" if figure.wide or lone else ""}"><h3>{escape(figure.title)}</h3>{figure.body}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    return f'<section><h2>{heading}</h2><div class="figures">{items}</div></section>'


def _samples(records: Records) -> str:
    texts = [(step, path) for step, path in records.samples if path.suffix == ".txt"]
    images = [(step, path) for step, path in records.samples if path.suffix == ".png"]
    parts = []
    if texts:
        *earlier, last = _spread(texts)
        parts.append(_text_sample(*last))
        if earlier:
            parts.append(
                f"<details><summary>Earlier samples ({len(earlier)})</summary>"
                + "".join(_text_sample(*sample) for sample in reversed(earlier))
                + "</details>"
            )
    if images:
        parts.append('<div class="images">' + "".join(_image_sample(*s) for s in reversed(_spread(images))) + "</div>")
    if not parts:
        return ""
    return f"<section><h2>{'What it writes' if texts else 'What it draws'}</h2>{''.join(parts)}</section>"


def _spread(samples: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """A few samples, evenly over the run, the first and the last among them."""
    if len(samples) <= _SAMPLES:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (_SAMPLES - 1))] for i in range(_SAMPLES)]


def _text_sample(step: int, path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip("\n")
    cut = len(text) > _SAMPLE_CHARACTERS
    shown = escape(text[:_SAMPLE_CHARACTERS]) + (f"\n[the rest is in {escape(path.name)}]" if cut else "")
    return f'<div class="sample"><h3>after step {step:,}</h3><pre>{shown}</pre></div>'


def _image_sample(step: int, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = f"Images sampled after step {step}"
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>after step {step:,}</figcaption></figure>"
    )


def _facts(records: Records) -> str:
    tables = []
    if data := records.run.get("data"):
        tables.append(f"<div><h3>Data</h3>{_data_table(data)}</div>")
    rows = [
        (label, form.format(plain(records.machine[key])))
        for key, (label, form) in _MACHINE.items()
        if records.machine.get(key) is not None
    ]
    if rows:
        tables.append(f"<div><h3>Machine</h3>{_table(rows)}</div>")
    if not tables:
        return ""
    return (
        f'<section><h2>Made of</h2><div class="{"two" if len(tables) == 2 else ""}">{"".join(tables)}</div></section>'
    )


def _data_table(data: object) -> str:
    """A table of splits where every value is a mapping, else of names and values."""
    if not isinstance(data, Mapping):
        return f"<p>{escape(plain(data))}</p>"
    if not all(isinstance(value, Mapping) for value in data.values()):
        return _table(list(data.items()))
    columns = list(dict.fromkeys(key for value in data.values() for key in value))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th>"
        + "".join(f"<td>{escape(plain(value[c])) if c in value else ''}</td>" for c in columns)
        + "</tr>"
        for name, value in data.items()
    )
    table = f'<table class="num"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _table(rows: Sequence[tuple[Any, Any]]) -> str:
    cells = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(plain(value))}</td></tr>" for name, value in rows)
    return f"<table><tbody>{cells}</tbody></table>"


def _config(records: Records) -> str:
    lines = []
    for line in records.config_text.splitlines():
        at = _comment_start(line)
        lines.append(escape(line[:at]) + (f"<span>{escape(line[at:])}</span>" if at < len(line) else ""))
    text = "\n".join(lines)
    return (
        "<section><h2>Configuration</h2><details><summary>Every setting, and where its value came from</summary>"
        f'<pre class="config">{text}</pre></details></section>'
    )


def _comment_start(line: str) -> int:
    """Where a TOML line's comment begins; its length if there is none. Strings may hold a #."""
    quote = ""
    skip = False
    for i, character in enumerate(line):
        if skip:
            skip = False
        elif quote:
            skip = character == "\\" and quote == '"'
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "#":
            return i
    return len(line)
