"""Progress on a terminal: one live region that is redrawn, with lasting lines above it."""

from __future__ import annotations

import threading

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lopt_lite.events import BlockDone, Event, Notice, Planned, RunStarted, Validation

from .plain_display import validation_text
from .progress_state import ProgressState, plan_texts, run_text
from .text import one_line

_BAR_WIDTH = 28


class LiveDisplay:
    """Draws on ``console`` until :meth:`stop`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = ProgressState()
        # Rich draws in a thread of its own, between any two events.
        self._state_lock = threading.Lock()
        self._spinner = Spinner("dots")
        # Standard output is left alone: it holds the result.
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        """Show the live region."""
        self._live.start()

    def stop(self) -> None:
        """Take the live region away; the lines above it stay."""
        self._live.stop()

    def notice(self, event: Notice) -> None:
        """Print what the user should know, above the live region."""
        self._line(f"note: {one_line(event.text)}")

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def update(self, event: Event) -> None:
        """Take in ``event``; the region shows it at the next redraw."""
        with self._state_lock:
            self._state.update(event)
        if isinstance(event, RunStarted):
            self._line(one_line(run_text(event)))
        elif isinstance(event, Planned):
            for text in plan_texts(event):
                self._line(text)
        elif isinstance(event, Validation):
            self._line(validation_text(event))
        elif isinstance(event, BlockDone):
            self._line(f"block {event.block + 1} of {event.blocks} done")

    def _draw(self) -> RenderableType:
        with self._state_lock:
            return self._draw_state()

    def _draw_state(self) -> RenderableType:
        state = self._state
        rows: list[RenderableType] = []
        if state.block is not None:
            rows.append(Text(one_line(state.block_text()), style="bold"))
            done = state.step.step if state.step is not None else state.block.step
            rows.append(_bar(done, state.block.steps, "  ".join(state.step_parts())))
        if state.job is not None:
            job = state.job
            rows.append(_bar(job.done, job.total, one_line(f"{job.task}: {job.done}/{job.total} {job.unit}")))
        if not rows:
            self._spinner.update(text=Text("reading the model and the data" if state.run is None else "working"))
            rows.append(self._spinner)
        return Group(*rows)


def _bar(done: int, total: int, text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=max(total, 1), completed=done, width=_BAR_WIDTH), Text(text))
    return grid
