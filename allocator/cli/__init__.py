"""The command ``allocator``: verbs over runs and plans.

The problem this package solves: a user's mistake costs one clear sentence and exit code 2, never a
traceback and never a finished measurement.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, NoReturn, cast

import typer

from allocator.cli.listing import list_kinds
from allocator.cli.picking import pick
from allocator.cli.plans import apply, evaluate, export, show
from allocator.cli.profiles import profile_model
from allocator.cli.runs import report, resume, search
from allocator.cli.solving import solve
from allocator.cli.studies import export_study_verb
from allocator.cli.terminal import console, errors
from allocator.cli.transferring import transfer_formula

_INTERRUPTED = 130
# What typer raises for words it cannot parse: click's own class, or that of the copy it carries.
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(version("model-allocator"), markup=False, highlight=False)
        raise typer.Exit


def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Find the allocation of bits that loses least under an exact byte budget."""


app = typer.Typer(
    name="allocator",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (search, resume, solve, pick, report, show, evaluate, export, apply):
    app.command()(command)
app.callback()(_main_options)
app.command("list")(list_kinds)
app.command("export-study")(export_study_verb)
app.command("profile")(profile_model)
app.command("transfer")(transfer_formula)


def main() -> None:
    """Run the command line; user errors end with one sentence and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = app(standalone_mode=False, prog_name=app.info.name)
    except _UsageError as error:
        _refuse_words(error)
    except ValueError as error:
        _refuse(one_sentence(error))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _refuse(
            f"cannot read or write{where}: {error.strerror or error}; "
            "give another path or make room; a run loses nothing of what it has measured"
        )
    if code == _INTERRUPTED:  # typer has made it of a KeyboardInterrupt
        errors.print("interrupted: a run loses nothing, 'allocator resume RUN' continues it")
    sys.exit(code)


def _refuse(sentence: str) -> NoReturn:
    errors.print(f"error: {sentence}", markup=False, highlight=False)
    sys.exit(2)


def _refuse_words(error: Any) -> NoReturn:
    """Say what is wrong with the words of a command, and where to read of it."""
    message = one_sentence(error.format_message())
    if not message:  # a command without words has shown its help
        sys.exit(error.exit_code)
    verb = error.ctx.command_path if error.ctx else app.info.name
    _refuse(f"{message.rstrip('.')}; see '{verb} --help'")


def one_sentence(error: Exception | str) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
