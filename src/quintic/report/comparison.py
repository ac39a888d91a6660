"""One page about several runs: which ends lowest, their curves over steps and seconds, sizes, settings that differ."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from quintic.core import ConfigError, DataError
from quintic.core.files import atomic_write
from quintic.report.charts import Series, line_chart
from quintic.report.figure import Figure
from quintic.report.html import Card, document, header, number_table, section
from quintic.report.records import Floats, Records, read_records
from quintic.report.words import count, duration, finite, plain

__all__ = ["check_runs", "write_comparison"]

_MACHINE = ("cpu", "device", "threads", "dtype", "torch", "kernels")
"""What of a machine decides how fast a run is."""
_ALONE = (
    "One run each: another seed may move a loss as far as a setting does, and a learning rate that suits one suits "
    "another less. quintic race tunes every side and repeats it."
)


@dataclass(frozen=True)
class _Measure:
    """What runs are compared by."""

    key: str
    name: str
    unit: str


@dataclass(frozen=True)
class _Entry:
    """A run of the comparison."""

    name: str
    records: Records
    hue: int
    measure: _Measure

    @property
    def end(self) -> float:
        """The last validation; infinite for a run without one."""
        last = self.records.last(self.measure.key)
        return math.inf if last is None else last

    @property
    def state(self) -> str:
        """Where the run is, if it is not finished."""
        status = str(self.records.run.get("status", ""))
        return "" if status == "finished" else f"{status or 'not finished'} at step {self.records.step:,}"


def check_runs(folders: Sequence[Path]) -> list[Records]:
    """Read the runs that are to be compared.

    Args:
        folders: Of two runs or more.

    Raises:
        CheckpointError: A folder holds no run, or one of its records is damaged.
        DataError: A run has not taken a step yet, or none was validated.
        ConfigError: A run is named twice, or they are of several tasks.
    """
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ConfigError("one run is named twice; name each once")
    runs = [read_records(folder) for folder in folders]
    tasks = {str(folder): str(records.config.get("task", "lm")) for folder, records in zip(folders, runs, strict=True)}
    if len(set(tasks.values())) > 1:
        found = ", ".join(f"{folder} is of {task}" for folder, task in tasks.items())
        raise ConfigError(f"runs of one task can be compared, found several: {found}")
    if not any(records.last("val_loss") is not None for records in runs):
        raise DataError("none of these runs was validated, so there is nothing to compare; see engine.eval_every")
    return runs


def write_comparison(runs: Sequence[Records], path: Path) -> Path:
    """Write the page of several runs.

    Args:
        runs: From :func:`check_runs`.
        path: The page; its folder is made.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _page(runs))
    return path


def _page(runs: Sequence[Records]) -> str:
    measure = _measure(runs)
    names = _names([records.folder for records in runs])
    entries = [_Entry(name, records, i, measure) for i, (name, records) in enumerate(zip(names, runs, strict=True))]
    ranked = sorted(entries, key=lambda entry: entry.end)
    body = [
        header(f"Comparison of {len(runs)} runs", f"{ranked[0].name} ends lowest", _lead(ranked), _cards(ranked)),
        section("Curves", [_curves(entries, "step"), _curves(entries, "seconds")]),
        f"<section><h2>Sizes</h2>{_sizes(ranked)}</section>",
        f"<section><h2>What differs</h2>{_differences(entries)}</section>",
    ]
    return document(f"Comparison: {', '.join(names)}", "\n".join(body), ", ".join(names))


def _measure(runs: Sequence[Records]) -> _Measure:
    """Bits where all runs have them, which no tokenizer changes; else the loss."""
    bits = runs[0].bits
    if bits is not None and all(records.last(f"val_{bits.key}") is not None for records in runs):
        return _Measure(f"val_{bits.key}", f"validation {bits.unit}", "")
    return _Measure("val_loss", "validation loss", runs[0].loss_unit)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths if two have one name."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _lead(ranked: Sequence[_Entry]) -> str:
    """Sentences, as HTML."""
    best, others = ranked[0], [entry for entry in ranked[1:] if math.isfinite(entry.end)]
    said = [
        f"Its {best.measure.name} is <b>{best.end:.4f}</b>"
        + "".join(f", {other.end - best.end:.4f} below {escape(other.name)}" for other in others[:1])
        + "."
    ]
    if len({repr(_data(entry.records)) for entry in ranked}) > 1:
        said.append("Not all had the same data, and what they are validated on differs: the numbers compare with care.")
    return " ".join([*said, _ALONE])


def _data(records: Records) -> object:
    """What a run was validated on, as far as its records say; tokens are the tokenizer's doing."""

    def without_tokens(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without_tokens(inner) for key, inner in sorted(value.items()) if key != "tokens"}

    return records.config.get("paths"), without_tokens(records.run.get("data"))


def _cards(ranked: Sequence[_Entry]) -> list[Card]:
    def note(entry: _Entry) -> str:
        if entry.state:
            return entry.state
        best = entry.records.best(entry.measure.key)
        return "" if best is None or best[1] == entry.end else f"best {best[1]:.4f} at step {best[0]:,}"

    return [(finite(e.end, 4, "none"), f"{e.measure.name} of {e.name}", note(e)) for e in ranked]


def _curves(entries: Sequence[_Entry], over: str) -> Figure | None:
    """Validation over ``step`` or ``seconds``."""
    series = []
    for entry in entries:
        x, y = _validations(entry, over)
        if np.isfinite(y).any():
            series.append(Series(entry.name, x, y, hue=entry.hue))
    if not series:
        return None
    measure = entries[0].measure
    ends = ", ".join(f"{s.name} ends at {s.y[np.isfinite(s.y)][-1]:.4f}" for s in series)
    seconds = over == "seconds"
    caption = (
        "Time in training steps, without validation; of one machine that did nothing else it compares."
        if seconds
        else "In mid-schedule a curve depends on how its learning rate falls: only the ends compare."
    )
    chart = line_chart(
        series,
        unit=measure.unit,
        label=f"{measure.name.capitalize()} over {'training time' if seconds else 'steps'}: {ends}",
        tall=True,
        x_name=over,
    )
    title = f"{measure.name.capitalize()} over {'seconds' if seconds else 'steps'}"
    return Figure(title, chart, caption, wide=True)


def _validations(entry: _Entry, over: str) -> tuple[Floats, Floats]:
    steps, values = entry.records.column(entry.measure.key)
    if over == "step":
        return steps, values
    seconds = dict(zip(*map(np.ndarray.tolist, entry.records.column("seconds")), strict=True))
    known = np.array([seconds.get(step, math.nan) for step in steps.tolist()], dtype=np.float64)
    there = np.isfinite(known)
    return known[there], values[there]


def _sizes(ranked: Sequence[_Entry]) -> str:
    def cells(entry: _Entry) -> list[str]:
        records = entry.records
        best = records.best(entry.measure.key)

        def number(value: object, told: Callable[[float], str]) -> str:
            return told(value) if isinstance(value, int | float) else ""

        return [
            finite(entry.end, 4),
            "" if best is None else f"{best[1]:.4f}<small>at step {best[0]:,}</small>",
            number(records.run.get("parameters_total"), count),
            number(records.run.get("parameters_active"), count),
            f"{records.step:,}",
            number(records.last("tokens"), count),
            number(records.last("seconds"), duration),
            number(records.median("tokens_per_second"), count),
        ]

    things = ranked[0].records.things
    columns = [ranked[0].measure.name, "best", "parameters", "active", "steps", things, "training time", f"{things}/s"]
    rows = [
        (escape(entry.name) + (f"<small>{escape(entry.state)}</small>" if entry.state else ""), cells(entry))
        for entry in ranked
    ]
    return number_table(columns, rows)


def _differences(entries: Sequence[_Entry]) -> str:
    """Settings, and facts of the machine, that are not the same in all runs."""
    every = [_facts(entry.records) for entry in entries]
    rows = []
    for name in dict.fromkeys(name for facts in every for name in facts):
        values = [facts.get(name, "") for facts in every]
        if len(set(values)) > 1:
            rows.append((escape(name), [escape(value) for value in values]))
    if not rows:
        return "<p>No setting, and nothing of the machine that is recorded.</p>"
    return number_table([entry.name for entry in entries], rows)


def _facts(records: Records) -> dict[str, str]:
    """What a run was told and where it ran, by name."""
    config = records.config
    facts = {"size": str(config.get("size", "")), "data": plain(config.get("paths") or records.run.get("title", ""))}
    if "from" in config:
        facts["from"] = str(config["from"])
    for section_name, fields in config.items():
        if isinstance(fields, dict):
            facts |= {f"{section_name}.{name}": plain(value) for name, value in fields.items()}
    return facts | {f"machine.{name}": plain(records.machine[name]) for name in _MACHINE if name in records.machine}
