"""Steps whose loss or gradient is not a finite number: skipped, and the end of a run when they do not stop."""

from __future__ import annotations

from lopt_lite.errors import DivergedError
from lopt_lite.events import Notice
from lopt_lite.training.block_plan import Stage
from lopt_lite.training.from_answers import NO_FINITE_LOSS
from lopt_lite.training.workbench import Workbench
from lopt_lite.units import counted

_MOST_IN_A_ROW = 5


class DivergenceWatch:
    """Counts the steps of one phase that had to be skipped.

    Attributes
    ----------
    in_a_row:
        Skipped steps since the last finite one.
    """

    def __init__(self, bench: Workbench, stage: Stage) -> None:
        self._bench, self._stage = bench, stage
        self.in_a_row = 0

    def note(self, finite: bool, step: int) -> None:
        """Take note of ``step`` (from 1), and tell the user of one that was skipped.

        Raises
        ------
        DivergedError
            It was one too many.
        """
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row >= _MOST_IN_A_ROW:
            raise self._error(step)
        self._bench.on_event(Notice(text=f"step {step}: the loss or its gradient is not finite; the step is skipped"))

    def end(self, steps: int) -> None:
        """Look back at the end of a phase of so many steps.

        Raises
        ------
        DivergedError
            None of them was finite, of however few.
        """
        if steps and self.in_a_row >= steps:
            raise self._error(steps)

    def _error(self, step: int) -> DivergedError:
        if self.in_a_row >= step:
            return DivergedError(
                f"{self._stage.name}: the loss or its gradient was not finite in any step so far, up to {step}",
                fix=f"lower --lr (and --lr-early); {NO_FINITE_LOSS}",
            )
        kept = self._bench.journal.last("checkpoint", block=self._stage.index) is not None
        fix = "lower --lr (and --lr-early) and start anew with --fresh"
        return DivergedError(
            f"{self._stage.name}: the loss or its gradient was not a finite number for "
            f"{counted(self.in_a_row, 'step')} in a row, up to step {step}",
            fix=f"{fix}; the last good checkpoint is kept" if kept else fix,
        )
