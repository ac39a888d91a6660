"""How the documentation is built: `make docs`, or `python -m sphinx -W -b html docs docs/_build/html`.

Nothing is fetched. A warning is an error, and so is a link to a name of the library that does not exist.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import quintic

project = "Quintic"
author = "The Quintic authors"
project_copyright = author
version = release = quintic.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
smartquotes = False  # --out is two dashes
# Names of others' libraries: nothing of theirs is fetched, so there is nothing to link to.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|collections|pathlib|tokenizers|PIL)\..*"),
    ("py:class", r"Tensor|\w+\[.*"),
]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what stands before the colon of a result is its name

html_math_renderer = "mathml"  # which browsers show by themselves: no script from elsewhere
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["quintic.css"]
html_title = f"Quintic {release}"
html_copy_source = False
html_show_sphinx = False

PACKAGES = (
    "linalg", "optim", "moe", "lm", "lowrank", "flow", "diffusion", "codec", "data", "engine", "core", "report",
    "runs",
)  # fmt: skip
for _module in (import_module(f"quintic.{package}") for package in PACKAGES):
    # Names that are imported at their first use, so that they are seen here.
    vars(_module).update({name: getattr(_module, name) for name in _module.__all__})


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Link a name by the path of its file to where it is documented; one that is documented nowhere stays plain.

    Docstrings say ``quintic.optim.lr.convert_lr``, the reference says ``quintic.optim.convert_lr``. A name that does
    not exist at all is left to nitpicky, which fails the build.
    """
    if node.get("refdomain") != "py":
        return None
    target, package = node["reftarget"].lstrip("~."), node.get("py:module") or "quintic"
    inside = [f"{module}.{target}" for module in sorted(sys.modules) if module.startswith(f"{package}.")]
    for path in (target, f"{package}.{target}", *inside):
        if (found := _find(path)) is None:
            continue
        home = str(getattr(found, "__module__", "")).split(".")[:2]
        documented = env.get_domain("py").objects
        for name in (path, ".".join([*home, path.rsplit(".", 1)[-1]])):
            if entry := documented.get(name):
                uri = app.builder.get_relative_uri(node.get("refdoc", env.docname), entry.docname)
                return nodes.reference("", "", content, internal=True, refuri=f"{uri}#{entry.node_id}")
        return content
    return None


def _find(path: str) -> Any:
    """The object of a dotted path within quintic, or None."""
    if path.split(".")[0] != "quintic":
        return None
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None


def mend(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make of our docstrings what Sphinx expects."""
    if what == "module":  # indented blocks and tables are shown as they stand
        lines[:] = [line for i in range(len(lines)) for line in _as_block(lines, i)]
        literal = [line.startswith("    ") for line in lines]
    else:
        literal = _in_examples(lines)
    lines[:] = [line if kept else _plain(line) for line, kept in zip(lines, literal, strict=True)]
    if what in ("attribute", "property") and lines and ":" in lines[0]:
        lines[0] = ": " + lines[0]  # Napoleon takes what stands before a colon for a type


def _as_block(lines: list[str], i: int) -> list[str]:
    """A line of a module's docstring; one that opens a block of formulas or a table, with what reST needs before it."""
    kinds = [_kind(line) for line in lines]
    if kinds[i] == "text" or not lines[i]:
        return [lines[i]]
    before = next((kind for kind, line in zip(reversed(kinds[:i]), reversed(lines[:i]), strict=True) if line), "text")
    opens = before == "text" and i > 0 and not lines[i - 1]
    return [*(["::", ""] if opens else []), ("    " if kinds[i] == "table" else "") + lines[i]]


def _kind(line: str) -> str:
    if line.startswith("|") and line.endswith("|"):
        return "table"
    return "formula" if line.startswith("   ") else "text"


def _in_examples(lines: list[str]) -> list[bool]:
    """Of each line, whether it belongs to a doctest."""
    inside, found = False, []
    for line in lines:
        inside = bool(line.strip()) and (inside or line.lstrip().startswith(">>>"))
        found.append(inside)
    return found


def _plain(line: str) -> str:
    """A line in which |x| is a norm and * is a product, unless it is a bullet, emphasis or code."""

    def escaped(match: re.Match[str]) -> str:
        bullet = not match.start() and line.startswith("* ")
        return "\\" + match[0] if match[0] in "*|" and not bullet else match[0]

    return re.sub(r"``.*?``|^ +\*(?= )|(?<![\w*])\*\w[^*]*\w\*(?![\w*])|[*|]", escaped, line)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Pages that are written by the code itself."""
    if docname == "api/cli":
        source[0] += _verbs()
    elif docname == "api/settings":
        source[0] += _settings()
    elif docname == "api/index":
        source[0] = source[0].replace("NAMES", _names())


def _verbs() -> str:
    """What ``--help`` says of every verb, with its examples."""
    from quintic.cli.app import EXIT_CODES, app

    codes = "\n".join(f"* {code}: {words}" for code, words in EXIT_CODES.items())
    text = app.generate_docs(output_format="markdown").replace(" -m sphinx", "")  # how this program was called
    text = re.sub(r"^# quintic\n|## Table of Contents\n.*?(?=\*\*Commands)", "", text, flags=re.DOTALL)
    first, *parts = re.split(r"^(?=##+ quintic )", text, flags=re.MULTILINE)
    made = [first, f"## Exit codes\n\n{codes}\n\n"]
    for part in parts:
        verb = app
        for word in part.split("\n", 1)[0].split()[2:]:
            verb = verb[word]
        made += [part, f"```text\n{verb.help_epilogue}\n```\n\n" if verb.help_epilogue else ""]
    return "".join(made)


def _names() -> str:
    """The names in ``quintic`` itself, by the package that they come from."""
    rows = []
    for package in PACKAGES:
        public = import_module(f"quintic.{package}").__all__
        names = ", ".join(f"{{py:obj}}`~quintic.{package}.{name}`" for name in quintic.__all__ if name in public)
        rows.append(f"| {{py:mod}}`quintic.{package}` | {names} |")
    return "\n".join(["| package | names in `quintic` |", "|---|---|", *rows])


def _settings() -> str:
    """Every setting of every task, in tables."""
    from quintic.cli.wiring import KINDS, build_settings, section_types
    from quintic.engine.config import field_help

    found: dict[str, str] = {}
    for task in KINDS:
        defaults = build_settings(task, "tiny", [])
        for section, kind in section_types(task).items():
            words = field_help(kind)
            rows = [
                f"| `{section}.{field.name}` | {_default(field)} | {words.get(field.name, '')} |"
                for field in dataclasses.fields(defaults[section])
            ]
            title = f"{section}, of {'text' if task == 'lm' else 'images'}" if section == "data" else section
            found[title] = "\n".join([f"## `{title}`", "", "| setting | default | meaning |", "|---|---|---|", *rows])
    return "\n\n".join(found.values()) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    return "" if value is dataclasses.MISSING or value == "" else f"`{value}`"


def formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    try:
        made = tex2mathml(re.sub(r"\\(text|display)style\b", "", node.astext()), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %s: %s", node.astext(), error, location=node)
        made = ""
    translator.body.append(f'<div class="formula">{made}</div>' if block else made)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve, priority=400)
    app.connect("autodoc-process-docstring", mend, priority=400)
    app.connect("source-read", fill)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
