"""One table: what an exception means to the user, and the exit code that goes with it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import typer

from lopt_lite.errors import LoptError, StoppedError, is_out_of_memory

from .quiet import debugging
from .text import json_document, one_line, plain

#: What typer raises for a command line that it cannot parse. The class has moved between typer's releases (and was
#: click's before); its public subclass has not.
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]


STOPPED = StoppedError.exit_code


class Report(NamedTuple):
    """An error as it is shown: its kind, exit code, and the three parts of its message."""

    error: str
    exit_code: int
    found: str
    expected: str | None = None
    fix: str | None = None

    def to_text(self) -> str:
        """The lines for standard error."""
        # A run that was asked to stop has no error to fix.
        asked_for = self.exit_code == STOPPED
        lines = [plain(self.found) if asked_for else f"error: {plain(self.found)}"]
        if self.expected:
            lines.append(f"  expected: {plain(self.expected)}")
        if self.fix:
            lines.append(f"  {'to go on' if asked_for else 'to fix'}: {plain(self.fix)}")
        return "\n".join(lines)


class _Row(NamedTuple):
    matches: Callable[[BaseException], bool]
    report: Callable[[Any], Report]


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _from_lopt_error(error: LoptError) -> Report:
    return Report(type(error).__name__, error.exit_code, error.found, error.expected, error.fix)


def _from_usage_error(error: Any) -> Report:
    command = error.ctx.command_path if error.ctx is not None else "lopt-lite"
    return Report("UsageError", 2, error.format_message(), fix=f"see {command} --help")


def _from_out_of_memory(error: BaseException) -> Report:
    return Report(
        "OutOfMemory",
        4,
        "out of memory" + (f": {_first_line(error)}" if str(error) else ""),
        fix="use a smaller --batch-size or --max-length, more --blocks or a --memory budget, and --fresh",
    )


def _from_disk_full(error: OSError) -> Report:
    where = f": cannot write {error.filename}" if error.filename else ""
    return Report("DiskFull", 4, f"the disk is full{where}", fix="free some space, then give the same command again")


def _is_name_too_long(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG


def _from_name_too_long(error: OSError) -> Report:
    name = os.fsdecode(error.filename or "")
    return Report(
        "NameTooLong",
        2,
        f"a name is too long for the file system: {one_line(name)[:80]}...",
        expected="a shorter one",
        fix="check the paths given; --output names the run directory",
    )


def _from_interrupt(error: BaseException) -> Report:
    return Report("Interrupted", STOPPED, "stopped", fix="give the same command again to go on")


def _from_anything(error: BaseException) -> Report:
    return Report(
        type(error).__name__,
        1,
        f"unexpected {type(error).__name__}: {_first_line(error)}",
        fix="this is a fault of lopt-lite: please report it, with the traceback that LOPT_LITE_DEBUG=1 shows",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return one_line(lines[0])[:500] if lines else "(no message)"


#: The first row that matches an exception decides.
TABLE = (
    _Row(lambda error: isinstance(error, LoptError), _from_lopt_error),
    _Row(lambda error: isinstance(error, USAGE_ERROR), _from_usage_error),
    _Row(lambda error: isinstance(error, KeyboardInterrupt), _from_interrupt),
    _Row(is_out_of_memory, _from_out_of_memory),
    _Row(_is_disk_full, _from_disk_full),
    _Row(_is_name_too_long, _from_name_too_long),
    _Row(lambda error: True, _from_anything),
)


def explain(error: BaseException) -> Report:
    """What to tell the user about ``error``."""
    return next(row.report(error) for row in TABLE if row.matches(error))


class ErrorBoundary:
    """A ``with`` block whose errors become messages on standard error and an exit code.

    Parameters
    ----------
    as_json:
        Also print the error as the one JSON document on standard output.

    Attributes
    ----------
    exit_code:
        0 until an error was caught.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self.exit_code = 0

    def __enter__(self) -> ErrorBoundary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, (SystemExit, GeneratorExit, typer.Exit)):
            return False
        report = explain(error)
        self.exit_code = report.exit_code
        # Where even the message cannot be written, the exit code still tells.
        with contextlib.suppress(OSError):
            if debugging():
                print_lines(plain("".join(traceback.format_exception(error))), to_stderr=True)
            print_lines(report.to_text(), to_stderr=True)
        with contextlib.suppress(OSError):
            if self._as_json:
                print_lines(json_document(report._asdict()))
        return True


def print_lines(text: str, *, to_stderr: bool = False) -> None:
    """Print and flush, so that a full disk behind a redirection is noticed; a reader that has gone is not an error."""
    stream = sys.stderr if to_stderr else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What is still buffered would be tried again when Python exits, and complain there.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise
