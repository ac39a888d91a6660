"""The page: sections in the order in which a person asks. How good, how it got there, what it makes, on what.

One HTML file that loads nothing: style, script, charts and images are inside, and its content policy tells the
browser to refuse anything else, scripts that are not ours included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from quintic.core.files import atomic_write
from quintic.report.curves import bits_figure, gradient_figure, loss_figure, rate_figure, speed_figure
from quintic.report.experts import balance_figure, load_figure
from quintic.report.html import Card, document, header, number_table, picture, section, table
from quintic.report.machine import machine_table
from quintic.report.records import Records, read_records
from quintic.report.spectra import spectra_figure
from quintic.report.words import count, duration, plain, significant

__all__ = ["render", "write_report"]

_KINDS = {"lm": "Language model", "tarflow": "TARFLOW image model", "ddpm": "Diffusion image model"}
_SAMPLES = 6
_SAMPLE_CHARACTERS = 4000


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
    title = str(records.run.get("title") or records.folder.absolute().name)
    bits, loss = bits_figure(records), loss_figure(records)
    learned, more = (bits, loss) if bits is not None else (loss, None)
    body = "\n".join(
        [
            _header(records, title),
            section("How it learned", [learned]),
            _samples(records),
            section(
                "Optimization",
                [
                    more,
                    rate_figure(records),
                    gradient_figure(records),
                    speed_figure(records),
                    spectra_figure(records),
                ],
            ),
            section("Experts", [balance_figure(records), load_figure(records)]),
            _facts(records),
            _config(records),
        ]
    )
    return document(title, body, records.folder.name)


def _header(records: Records, title: str) -> str:
    run = records.run
    kind = _KINDS.get(str(run.get("task")), str(run.get("task", "Training run")))
    size = f", size {run['size']}" if run.get("size") else ""
    state = str(run.get("status", ""))
    if state in ("stopped", "failed"):
        state = f"{state} at step {records.step:,}"
    return header(kind + size, title, _summary(records), _cards(records), state=state)


def _summary(records: Records) -> str:
    """One or two sentences, as HTML."""
    took = f"{records.step:,} step{'s' * (records.step != 1)}"
    if (seconds := records.last("seconds")) is not None:
        took += f" in {duration(seconds)}"
    if cpu := records.machine.get("cpu"):
        device = str(records.machine.get("device", "cpu"))
        took += f" on {escape(str(cpu) if device == 'cpu' else device)}"
    found = records.bits
    bits = None if found is None else records.last(f"val_{found.key}")
    loss = records.last("val_loss")
    if found is not None and bits is not None:
        result = f"On {found.data} it never saw it needs <b>{bits:.3f} {found.unit}</b>; {found.raw}."
    elif loss is not None:
        unit = f" {records.loss_unit}" if records.loss_unit else ""
        result = f"On data it never saw its loss is <b>{significant(loss, 4)}</b>{unit}."
    else:
        result = "It was not validated yet."
    why = records.run.get("error")
    end = f" It ended with an error: {escape(str(why))}" if why and records.run.get("status") == "failed" else ""
    return f"{took}. {result}{end}"


def _cards(records: Records) -> list[Card]:
    run = records.run
    things = records.things
    cards: list[Card] = []

    def best(key: str, digits: int) -> str:
        found = records.best(key)
        if found is None or found[0] == records.step:
            return "the best of the run" if found else ""
        return f"best {found[1]:.{digits}f} at step {found[0]:,}"

    found = records.bits
    if found is not None and (bits := records.last(f"val_{found.key}")) is not None:
        cards.append((f"{bits:.3f}", f"validation {found.unit}", best(f"val_{found.key}", 3)))
    if (loss := records.last("val_loss")) is not None:
        cards.append((f"{loss:.3f}", "validation loss", records.loss_unit if cards else best("val_loss", 3)))
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
        note = f"{count(active)} active for a token" if isinstance(active, int) and active != total else ""
        cards.append((count(total), "parameters", note))
    if isinstance(memory := records.machine.get("peak_memory_mb"), int | float):
        cards.append((f"{memory:,.0f} MiB", "peak memory", ""))
    return cards


def _passes(run: Mapping[str, Any], tokens: float) -> str:
    """How often the training data was gone through, where its size is recorded."""
    data = run.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    size = train.get("tokens") if isinstance(train, Mapping) else None
    if not (isinstance(size, int) and size > 0):
        return ""
    passes = tokens / size
    return f"{passes:.1f} passes over the data" if passes >= 0.1 else "less than a tenth of the data"


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
    return picture(path.read_bytes(), f"Images sampled after step {step}", f"after step {step:,}")


def _facts(records: Records) -> str:
    data = records.run.get("data")
    tables = [f"<div><h3>Data</h3>{_data_table(data)}</div>"] if data else []
    if machine := machine_table(records.machine):
        tables.append(machine)
    if not tables:
        return ""
    return (
        f'<section><h2>Made of</h2><div class="{"two" if len(tables) == 2 else ""}">{"".join(tables)}</div></section>'
    )


_WORDS = {"shape": "channels, height, width"}
"""What a name in the records means, where it does not say so itself."""


def _data_table(data: object) -> str:
    """A table of splits where every value is a mapping, else of names and values."""
    if not isinstance(data, Mapping):
        return f"<p>{escape(plain(data))}</p>"
    if not all(isinstance(value, Mapping) for value in data.values()):
        return table([(_WORDS.get(name, str(name)), plain(value)) for name, value in data.items()])
    columns = list(dict.fromkeys(key for value in data.values() for key in value))
    return number_table(
        [str(column) for column in columns],
        [
            (escape(str(name)), [escape(plain(value[c])) if c in value else "" for c in columns])
            for name, value in data.items()
        ],
    )


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
