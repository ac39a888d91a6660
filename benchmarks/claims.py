"""What others claim and what was measured here: the first table of RESULTS.md; and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Claim(NamedTuple):
    """One row."""

    claim: str
    source: str
    measured: str
    """With the half width of a 95 % interval over seeds where there are any."""
    seeds: int
    """0 where nothing is random."""
    holds: str
    """yes, no, or in which sense."""
    command: str
    """Name of the benchmark."""


def claims_section(claims: Sequence[Claim]) -> str:
    """The claims as a section."""
    head = ("claim", "source", "measured here", "seeds", "holds here", "command: `python -m benchmarks` and")
    rows = [(c.claim, c.source, c.measured, str(c.seeds or ""), c.holds, f"`{c.command}`") for c in claims]
    return (
        "## Claims, and what was measured\n\n"
        "After \u00b1 stands half of a 95 % interval (Student's t) over seeds; differences are taken seed by seed. The "
        "models are\nsmall and briefly trained: what is seen is a sign that things work as they should, not a law.\n\n"
        + table(head, rows)
    )


def provenance_section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """By what version, with what seeds and on what machine each result was made.

    Example:
        >>> print(provenance_section({"a": {"version": "1.0", "seeds": [0, 1], "machine": None}}).splitlines()[-1])
        | `a` | 1.0 | 0, 1 | not recorded |
    """
    rows = [
        (f"`{name}`", result["version"], ", ".join(map(str, result["seeds"])), _machine(result["machine"]))
        for name, result in results.items()
    ]
    return (
        "## Versions, seeds and machines\n\nWhere a result says nothing else, its numbers were taken so.\n\n"
        + table(("command: `python -m benchmarks` and", "quintic", "seeds", "machine"), rows)
    )


def _machine(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "not recorded"
    instructions = f" ({facts['instructions']})" if "instructions" in facts else ""
    return (
        f"{facts['cpu']}{instructions}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}, torch {facts['torch']}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, *rows)).replace(
        " |\n", " |\n" + "|---" * len(head) + "|\n", 1
    )


def holds(low_is_good: float, half: float) -> str:
    """Whether a difference that should be below 0 is, beyond its interval.

    Example:
        >>> holds(-0.1, 0.02), holds(0.1, 0.02), holds(-0.01, 0.02)
        ('yes', 'no', 'undecided: within the noise')
    """
    if abs(low_is_good) <= half:
        return "undecided: within the noise"
    return "yes" if low_is_good < 0 else "no"
