"""``lopt-lite report``: a run as one HTML page."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import ReportOutcome
from lopt_lite.settings import ReportSettings

from .command import Command
from .text import one_line
from .units import duration_text, loss_text


def _report(settings: ReportSettings, on_event: OnEvent) -> ReportOutcome:
    return lopt_lite.report(settings, on_event=on_event)


def _render(outcome: ReportOutcome) -> str:
    lines = [
        f"report  {outcome.report}",
        f"curves  {'none yet: no step was taken' if outcome.picture is None else outcome.picture}",
        f"state   {outcome.state}; next: {outcome.next}",
    ]
    if outcome.seconds_left:
        lines[-1] += f", about {duration_text(outcome.seconds_left)} left"
    if outcome.loss_before is not None and outcome.loss_after is not None:
        before, after = loss_text(outcome.loss_before), loss_text(outcome.loss_after)
        lines.append(f"held-out loss  {before} before, {after} after (nats per answer token)")
    elif outcome.final_train_loss is not None:
        lines.append(f"training loss  {loss_text(outcome.final_train_loss)} (nats per answer token)")
    return "\n".join([*lines, *(f"notice  {one_line(notice)}" for notice in outcome.notices)])


COMMAND = Command(
    name="report",
    help="Write what a run has done as one HTML page, RUN/report.html, with its loss curves (also RUN/loss.png). Works "
    "while it trains.",
    settings=ReportSettings,
    operation=_report,
    render=_render,
)
