"""The ``quintic`` command: verbs, and what an error looks like.

A user's mistake is one short message on standard error and exit code 2, never a traceback; training that
cannot go on is exit code 1. Verbs import torch inside their bodies, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
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

__all__ = ["app", "main"]

app = App(
    name="quintic",
    help="Pretrain mixture-of-experts language models with Muon on your own text; train flows and diffusion models of "
    "images; code images; explain matrices.",
    version=quintic.__version__,
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
    errors = Console(stderr=True)
    try:
        app(arguments, exit_on_error=False, print_error=True, error_console=errors)
    except CycloptsError:
        sys.exit(2)
    except UserError as error:
        errors.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(2)
    except QuinticError as error:
        errors.print(Text.assemble(("stopped: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; the last checkpoint is intact")
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) went away; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        errors.print(Text.assemble(("error: ", "bold red"), _words(error)), soft_wrap=True)
        sys.exit(2)


def _words(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; what was saved before is intact"
