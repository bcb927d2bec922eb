"""``lopt-lite generate``: try the tuned model."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import GenerateOutcome
from lopt_lite.settings import GenerateSettings

from .command import Command


def _generate(settings: GenerateSettings, on_event: OnEvent) -> GenerateOutcome:
    return lopt_lite.generate(settings, on_event=on_event)


def _render(outcome: GenerateOutcome) -> str:
    return outcome.text


COMMAND = Command(
    name="generate",
    help="Answer --prompt with the tuned model (or, with --base, the untouched one). Prints the answer alone.",
    settings=GenerateSettings,
    operation=_generate,
    render=_render,
)
