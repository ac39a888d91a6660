"""The ``quintic`` command: verbs, their help, and what an error looks like.

A user's mistake is one short message on standard error and exit code 2, never a traceback; the other codes are in
:data:`EXIT_CODES` and at the end of ``quintic --help``. Verbs import torch inside their bodies, so that ``--help`` is
quick. Examples stand at the end of a verb's docstring and of its help.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, ArgumentCollection, CycloptsError, CycloptsPanel, Parameter, UnknownOptionError
from rich.console import Console
from rich.text import Text

import quintic
from quintic.cli import (
    codec,
    doctor,
    evaluate,
    export,
    generate,
    import_model,
    matrix,
    plan,
    race,
    report,
    resume,
    roles,
    train,
    verify_resume,
)
from quintic.core import QuinticError, UserError

__all__ = ["EXIT_CODES", "app", "main"]

EXIT_CODES = {
    0: "done, or stopped on request with everything saved",
    1: "training cannot go on, or a proof failed",
    2: "a mistake that you can mend; the message says how",
    130: "interrupted by Ctrl-C",
    141: "the reader of the output went away",
}
"""What a script may rely on."""

_WITH_SETTINGS = ("train", "race", "plan", "roles", "evaluate")

app = App(
    name="quintic",
    help="Pretrain mixture-of-experts language models with Muon on your own text; train flows and diffusion models of "
    "images; code images; explain matrices.",
    help_format="plaintext",
    help_epilogue="Exit codes:\n" + "\n".join(f"  {code:>3}  {words}" for code, words in EXIT_CODES.items()),
    version=quintic.__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,  # it is told in words below
)
for _verb in (
    train.train,
    resume.resume,
    generate.generate,
    evaluate.evaluate,
    export.export,
    plan.plan,
    race.race,
    report.report,
    verify_resume.verify_resume,
    roles.roles,
    doctor.doctor,
):
    app.command(_verb)
app.command(import_model.import_model, name="import")
app.command(matrix.matrix)
app.command(codec.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: Without the program's name; ``None`` takes ``sys.argv``.
    """
    for name in ("stdout", "stderr"):  # closed by the caller (>&-): what is said goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    """The exit code of a command."""
    errors = Console(stderr=True)
    try:
        app(
            arguments, exit_on_error=False, error_console=errors, result_action="return_none",
            error_formatter=_panel,
        )  # fmt: skip
        sys.stdout.flush()
    except CycloptsError as error:
        if hint := _about_settings(error):
            errors.print(hint, soft_wrap=True)
        return 2
    except UserError as error:
        errors.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        return 2
    except QuinticError as error:
        errors.print(Text.assemble(("stopped: ", "bold red"), str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("\ninterrupted; what was saved before is intact")
        return 130
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich says it
            return _reader_left()
        raise
    except OSError as error:
        errors.print(Text.assemble(("error: ", "bold red"), _words(error)), soft_wrap=True)
        return 2
    return 0


def _about_settings(error: CycloptsError) -> str:
    """What to say to somebody who gave a setting, or the option --log of before, as an option; empty if nobody did."""
    from quintic.cli.wiring import section_types
    from quintic.engine.config import known_settings
    from quintic.engine.setting_names import meant

    verb = " ".join(error.command_chain or ())
    unknown = error.token.keyword or error.token.value if isinstance(error, UnknownOptionError) else ""
    if unknown == "--log" and verb in ("train", "resume"):
        return "where metrics go besides the run folder: --tracker tensorboard (trackio, wandb)"
    if unknown and verb in _WITH_SETTINGS:
        setting = meant(unknown, known_settings(section_types("lm")))
        if setting is not None:
            return f"settings have no dashes: {setting}=...    (quintic train --settings lists all)"
    if verb == "generate" and error.unused_tokens:
        return 'the text to continue is an option: quintic generate RUN --prompt "..."'
    return ""


def _panel(error: CycloptsError) -> Any:
    """The box of a mistake; where we know what was meant, without a guess at an option that looks like it."""
    if isinstance(error, UnknownOptionError) and _about_settings(error):
        error.argument_collection = ArgumentCollection()
    return CycloptsPanel(error)


def _reader_left() -> int:
    """The reader (head, less) went away, which is no error of ours: nothing more is written there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _words(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return f"{place}{error.strerror or error}" + ("; what was saved before is intact" if full else "")


def _examples(function: Callable[..., Any]) -> str:
    """The section "Examples" of a docstring, which is shown below the options."""
    _, _, text = inspect.cleandoc(function.__doc__ or "").partition("\nExamples\n--------\n")
    return "Examples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines()) if text else ""


def _unwrapped(docstring: str) -> str:
    """Paragraphs and descriptions of parameters in one line each: a help text breaks where the terminal ends."""
    words, mark, parameters = inspect.cleandoc(docstring).partition("\nParameters\n----------\n")
    descriptions, examples_mark, examples = parameters.partition("\nExamples\n--------\n")
    words = re.sub(r"(?<=\S)\n(?=\S)", " ", words)
    descriptions = re.sub(
        r"(?<=\n    )(\S.*(?:\n    \S.*)+)", lambda lines: lines[0].replace("\n    ", " "), descriptions
    )
    return words + mark + descriptions + examples_mark + examples


def _complete_help(commands: App) -> None:
    """Give every verb below its examples, after its parameters, and lines as long as the terminal is wide."""
    for verb in (commands[name] for name in commands if not name.startswith("-")):
        if verb.default_command is not None:
            verb.help_epilogue = _examples(verb.default_command)
            verb.default_command.__doc__ = _unwrapped(verb.default_command.__doc__ or "")
        _complete_help(verb)


_complete_help(app)
app.register_install_completion_command(help="Complete verbs and options in your shell (bash, zsh, fish, PowerShell).")
