"""``lopt-lite export``: write the adapter or a merged checkpoint."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import ExportOutcome
from lopt_lite.settings import ExportSettings

from .command import Command
from .units import bytes_text


def _export(settings: ExportSettings, on_event: OnEvent) -> ExportOutcome:
    return lopt_lite.export(settings, on_event=on_event)


def _render(outcome: ExportOutcome) -> str:
    onto = f", onto the {outcome.onto} weights" if outcome.onto else ""
    return f"{outcome.format}{onto}: {outcome.out} ({bytes_text(outcome.bytes)})"


COMMAND = Command(
    name="export",
    help="Write the result of a run to OUT: the PEFT adapter, or a whole Hugging Face checkpoint with it merged in.",
    settings=ExportSettings,
    operation=_export,
    render=_render,
)
