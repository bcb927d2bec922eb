"""Progress as lines, for logs and pipes: enough to follow, never a flood."""

from __future__ import annotations

import time
from collections.abc import Callable

from lopt_lite.events import BlockDone, BlockStarted, Event, Notice, Planned, Progress, RunStarted, Step, Validation

from .progress_state import ProgressState, plan_texts, run_text
from .text import one_line
from .units import loss_text

#: A line of progress comes when a tenth of the work or a minute has passed, and not within five seconds of another.
_SHARE = 0.1
_LONGEST_SILENCE_S = 60.0
_SHORTEST_GAP_S = 5.0


class PlainDisplay:
    """Writes lines through ``write_line``.

    Parameters
    ----------
    write_line:
        Prints one line.
    clock:
        Seconds that only go up.
    """

    def __init__(self, write_line: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write_line = write_line
        self._clock = clock
        self._state = ProgressState(clock)
        self._last_line_s = clock()
        self._last_share = 0.0
        self._task = ""

    def start(self) -> None:
        """Nothing to set up."""

    def stop(self) -> None:
        """Nothing to take down."""

    def notice(self, event: Notice) -> None:
        """Print what the user should know."""
        self._write_line(f"note: {one_line(event.text)}")

    def update(self, event: Event) -> None:
        """Print what ``event`` says, if it is time for a line."""
        self._state.update(event)
        if isinstance(event, RunStarted):
            self._write_line(run_text(event))
        elif isinstance(event, Planned):
            for text in plan_texts(event):
                self._write_line(text)
        elif isinstance(event, BlockStarted):
            resumed = f", going on at step {event.step}" if event.step else ""
            self._write_line(f"{self._state.block_text()}, {event.steps} steps{resumed}")
            self._begin_work(f"block {event.block}", event.step / max(event.steps, 1))
        elif isinstance(event, Step):
            if self._due(event.step, event.steps):
                self._write_line(f"  block {event.block + 1}  " + "  ".join(self._state.step_parts()))
        elif isinstance(event, Progress):
            if event.task != self._task:
                self._begin_work(event.task, (event.done - 1) / max(event.total, 1))
            if self._due(event.done, event.total):
                self._write_line(f"  {event.task}: {event.done}/{event.total} {event.unit}")
        elif isinstance(event, Validation):
            self._write_line(validation_text(event))
        elif isinstance(event, BlockDone):
            self._write_line(f"block {event.block + 1} of {event.blocks} done")

    def _begin_work(self, task: str, share: float) -> None:
        self._task = task
        self._last_share = share
        self._last_line_s = self._clock()

    def _due(self, done: int, total: int) -> bool:
        now = self._clock()
        share = done / max(total, 1)
        silent_s = now - self._last_line_s
        enough = share - self._last_share >= _SHARE or silent_s >= _LONGEST_SILENCE_S
        if not (done >= total or (enough and silent_s >= _SHORTEST_GAP_S)):
            return False
        self._last_line_s, self._last_share = now, share
        if done >= total:
            self._task = ""
        return True


def validation_text(event: Validation) -> str:
    """The held-out loss, and when it was measured."""
    when = "before training" if event.epoch == 0 else f"after epoch {event.epoch} of {event.epochs}"
    return f"held-out loss {when}: {loss_text(event.loss)} nats per answer token"
