"""What others claim and what was measured here: a table of RESULTS.md; and tables and anchors in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CLAIMS = "Claims, and what was measured"
"""Heading of their table, from which the pages of the posts take their rows."""


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

    @property
    def verdict(self) -> str:
        """yes, no or undecided.

        Example:
            >>> Claim("", "", "", 0, "no: not on 2 of 10 matrices", "").verdict
            'no'
        """
        return re.split(r"\W", self.holds)[0]


def claims_section(claims: Sequence[Claim]) -> str:
    """The claims as a section."""
    head = ("claim", "measured here", "holds here", "source", "seeds", "`python -m benchmarks`")
    rows = [(c.claim, c.measured, c.holds, c.source, str(c.seeds or ""), f"`{c.command}`") for c in claims]
    return (
        f"## {CLAIMS}\n\n"
        "The number after \u00b1 is half of a 95 % interval (Student's t) over seeds; differences, of losses or of "
        "bits, are taken\nseed by seed. The models are small and briefly trained: a result is a sign that things work "
        "as they should,\nnot a law. The source is the post or paper that makes the claim, or *ours* for a bar that we "
        "set ourselves.\n\n" + table(head, rows)
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
        "## Versions, seeds and machines\n\nUnless its section says otherwise, each result was measured like this.\n\n"
        + table(("`python -m benchmarks`", "quintic", "seeds", "machine"), rows)
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


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading.

    Example:
        >>> slug("Beside transformers' DeepSeek-V3")
        'beside-transformers-deepseek-v3'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def holds(low_is_good: float, half: float) -> str:
    """Whether a difference that should be below 0 is, beyond its interval.

    Example:
        >>> holds(-0.1, 0.02), holds(0.1, 0.02), holds(-0.01, 0.02)
        ('yes', 'no', 'undecided: within the noise')
    """
    if abs(low_is_good) <= half:
        return "undecided: within the noise"
    return "yes" if low_is_good < 0 else "no"
