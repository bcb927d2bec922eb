"""A run as one page to read in the morning: ``lopt_lite.report``."""

from __future__ import annotations

import base64
from datetime import datetime
from importlib import resources

import jinja2

from lopt_lite import files
from lopt_lite.events import OnEvent, ignore
from lopt_lite.outcomes import ReportOutcome
from lopt_lite.results.loss_plot import draw_losses
from lopt_lite.results.report_content import ReportContent, report_content
from lopt_lite.results.run_record import RunRecord, read_run
from lopt_lite.settings import ReportSettings
from lopt_lite.text import plain

_TEMPLATE = "report.html.j2"


def report(settings: ReportSettings, on_event: OnEvent = ignore) -> ReportOutcome:
    """Write RUN/report.html, one file that needs no other, and its picture as RUN/loss.png.

    Reads what the run has written of itself, takes no lock and opens no model: safe while the run trains.

    Raises
    ------
    RunDirectoryError
        The directory is no run, or cannot be written.
    DoesNotFitError
        The disk is full.
    """
    record = read_run(settings.run)
    content = report_content(record)
    root = record.paths.root
    picture = draw_losses(record.stages, record.held_out, record.step_counts)
    if picture is not None:
        files.write_bytes(root / "loss.png", picture)
    files.write_bytes(root / "report.html", render(content, picture).encode())
    return _outcome(record, content, has_picture=picture is not None)


def render(content: ReportContent, picture: bytes | None) -> str:
    """The page. All text in it is escaped, and what could steer a terminal or turn the direction of text is visible.

    Parameters
    ----------
    picture:
        A PNG file, or None.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    source = resources.files("lopt_lite.results").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        content=content,
        picture=None if picture is None else base64.b64encode(picture).decode("ascii"),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _outcome(record: RunRecord, content: ReportContent, *, has_picture: bool) -> ReportOutcome:
    root, found = record.paths.root, record.status
    last = record.stages[-1].phase("train")
    return ReportOutcome(
        run=found.run,
        report=str(root / "report.html"),
        picture=str(root / "loss.png") if has_picture else None,
        state=found.state,
        next=found.next,
        seconds_left=found.seconds_left,
        loss_before=found.loss_before,
        loss_after=found.loss_after,
        final_train_loss=None if last is None else last.last_loss,
        device_peak_bytes=record.peak("device_peak_bytes"),
        predicted_bytes=record.predicted("predicted_bytes"),
        notices=content.notices,
    )
