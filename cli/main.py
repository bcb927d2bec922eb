"""The entry point: ``lopt-lite``."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import typer

import lopt_lite

from . import evaluate, export, generate, plan, quantize, report, status, train
from .command import add_command
from .errors import ErrorBoundary, print_lines
from .signals import ignore_ending_signals

#: In the order of a user's work, which is the order of --help.
COMMANDS = (
    train.COMMAND,
    plan.COMMAND,
    status.COMMAND,
    report.COMMAND,
    evaluate.COMMAND,
    generate.COMMAND,
    export.COMMAND,
    quantize.COMMAND,
)

_HELP = (
    "Post-train language models that are larger than your memory, block by block (LoPT). "
    "Results go to standard output, progress and warnings to standard error."
)

_EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected; 2 usage or settings; 3 bad model or data; 4 does not fit (memory or disk); "
    "5 the run directory is in use or does not match; 6 training diverged; 75 stopped, the same command continues."
)

app = typer.Typer(
    name="lopt-lite",
    help=_HELP,
    epilog=_EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(value: bool) -> None:
    if value:
        print_lines(f"lopt-lite {lopt_lite.__version__}")
        raise typer.Exit(0)


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    if context.invoked_subcommand is None:
        # With typer's own formatting the text is printed, and nothing is returned.
        with contextlib.redirect_stdout(sys.stderr):
            context.get_help()
        raise typer.Exit(2)


for _command in COMMANDS:
    add_command(app, _command)


def _open_closed_streams() -> None:
    """Give standard streams that were closed (``2>&-``) a place where nobody looks.

    Else the next file that is opened would have their number, and libraries would write their warnings into it.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Run the command line ``arguments`` (without the program's name) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or file in an old encoding shows what it cannot write as \\u escapes.
            stream.reconfigure(errors="backslashreplace")
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    with ErrorBoundary(as_json="--json" in options) as boundary:
        code = typer.main.get_command(app).main(arguments, prog_name="lopt-lite", standalone_mode=False)
        if code == 130:
            # How typer reports Ctrl-C while it is parsing.
            raise KeyboardInterrupt
        return int(code or 0)
    return boundary.exit_code


def run() -> None:
    """The console script."""
    _open_closed_streams()
    code = main(sys.argv[1:])
    ignore_ending_signals()
    sys.exit(code)
