"""What all commands share: parse, call one function of the package, print its outcome, exit with its code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import typer

from lopt_lite.events import OnEvent
from lopt_lite.outcomes import Outcome

from .display import Display
from .errors import ErrorBoundary, print_lines
from .options import parameters, resolve
from .quiet import silence_libraries
from .signals import EndingSignals
from .text import json_document, plain


class Command(NamedTuple):
    """One command of the command line.

    ``operation`` takes the settings and a listener and returns an outcome; ``render`` writes that outcome as text.
    """

    name: str
    help: str
    settings: type[Any]
    operation: Callable[[Any, OnEvent], Outcome]
    render: Callable[[Any], str]
    #: With --json, events are JSON too: one a line, on standard error.
    json_events: bool = False


def add_command(app: typer.Typer, command: Command) -> None:
    """Register ``command``, its options generated from its settings dataclass."""

    def call(**given: Any) -> None:
        as_json = bool(given.pop("as_json"))
        raise typer.Exit(execute(command, given, as_json=as_json))

    text = "Print the result (or the error) as one JSON document."
    if command.json_events:
        text += " What happens meanwhile is written to standard error as JSON too, one event a line."
    json_option = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=typer.Option(False, "--json", help=text), annotation=bool
    )
    signature = inspect.Signature([*parameters(command.settings), json_option])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    app.command(command.name, help=command.help)(call)


def execute(command: Command, given: dict[str, Any], *, as_json: bool) -> int:
    """Run ``command`` with the options ``given`` and return its exit code."""
    silence_libraries()
    # A training takes signals as requests to stop at a safe place once it has begun; until then it is as the others.
    signals = EndingSignals()
    with signals, ErrorBoundary(as_json=as_json) as boundary:
        with signals.work():
            settings = resolve(command.settings, given, command=command.name)
            lines = as_json and command.json_events
            with Display(quiet=getattr(settings, "quiet", False), json_lines=lines) as display:
                outcome = command.operation(settings, display.on_event)
        print_lines(json_document(outcome.to_json()) if as_json else plain(command.render(outcome)))
    return boundary.exit_code
