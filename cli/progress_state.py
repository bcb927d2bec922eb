"""What a run is doing now, put together from its events. Both displays draw from it."""

from __future__ import annotations

import time
from collections.abc import Callable

from lopt_lite.events import BlockDone, BlockStarted, Event, Planned, Progress, RunStarted, Step

from .units import bytes_text, counted, duration_text, gib_text, loss_text, residence_text

#: Weight of the newest step in the running mean of seconds per step.
_NEWEST = 0.1


class ProgressState:
    """The latest event of each kind, and the speed of the steps.

    Parameters
    ----------
    clock:
        Seconds that only go up.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.run: RunStarted | None = None
        self.block: BlockStarted | None = None
        self.step: Step | None = None
        self.job: Progress | None = None
        self._previous_step_s: float | None = None
        self._seconds_per_step: float | None = None

    def update(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, RunStarted):
            self.run = event
        elif isinstance(event, BlockStarted):
            self.block, self.step, self.job = event, None, None
            self._previous_step_s, self._seconds_per_step = self._clock(), None
        elif isinstance(event, Step):
            self.step, self.job = event, None
            self._measure()
        elif isinstance(event, Progress):
            self.job = event if event.done < event.total else None
            if not event.task.startswith("layers of"):
                # The time that it takes is not the steps'.
                self._previous_step_s = None
        elif isinstance(event, BlockDone):
            self.block, self.step = None, None

    def _measure(self) -> None:
        now, before = self._clock(), self._previous_step_s
        self._previous_step_s = now
        if before is None:
            return
        took = now - before
        mean = self._seconds_per_step
        self._seconds_per_step = took if mean is None else mean + _NEWEST * (took - mean)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the present stretch of steps ends, None before the first step."""
        if self.step is None or self._seconds_per_step is None:
            return None
        return (self.step.steps - self.step.step) * self._seconds_per_step

    def block_text(self) -> str:
        """Which block of how many, and what it learns."""
        block = self.block
        if block is None:
            return ""
        layers = f"layers {block.first_layer + 1}-{block.end_layer}"
        return f"block {block.block + 1} of {block.blocks} ({layers}): {block.objective}"

    def step_parts(self) -> list[str]:
        """The present step in short phrases: phase, epoch, step, loss, speed, time left, memory."""
        step = self.step
        if step is None:
            return []
        parts = [
            f"epoch {step.epoch}",
            f"step {step.step}/{step.steps}",
            f"loss {loss_text(step.loss)}",
            f"{step.tokens_per_s:,.0f} tokens/s",
        ]
        if step.phase != "train":
            parts.insert(0, step.phase)
        if self.seconds_left is not None:
            parts.append(f"{duration_text(self.seconds_left)} left")
        parts.append(self._memory(step))
        return parts

    def _memory(self, step: Step) -> str:
        host = bytes_text(step.host_rss_bytes)
        if self.run is None or self.run.device == "cpu":
            # On the CPU the device's memory is the process's.
            return f"memory {host}"
        return f"device {bytes_text(step.device_peak_bytes)}, host {host}"


def plan_texts(plan: Planned) -> list[str]:
    """What a run is going to do: layers, memory, disk and time, and what limits it."""
    device = "the process" if plan.device == "cpu" else f"{plan.device} memory"
    host = "" if plan.device == "cpu" else f" and {gib_text(plan.predicted_host_bytes)} of host memory"
    again = ", each layer run again on the way back" if plan.recompute else ""
    return [
        f"plan: {residence_text(plan.mode, plan.resident_layers, plan.layers)}",
        f"  {plan.step_tokens:,} tokens a step, up to {plan.micro_batch_tokens:,} at once{again}",
        f"  predicted peak {gib_text(plan.predicted_bytes)} of {device} (budget {gib_text(plan.budget_bytes)}){host}; "
        f"{gib_text(plan.disk_bytes)} of disk; about {duration_text(plan.seconds)} in all",
        *(f"  {text}" for text in plan.advice),
    ]


def run_text(run: RunStarted) -> str:
    """The first line of a run: what is trained on what, where."""
    held_out = f", {counted(run.validation_examples, 'held-out example')}" if run.validation_examples else ""
    begins = "going on with" if run.resumed else "training"
    return (
        f"{begins} {run.model} on {counted(run.examples, 'example')}{held_out} "
        f"({counted(run.tokens, 'token')}, {run.answer_tokens:,} of them answers), "
        f"{counted(run.layers, 'layer')} in {counted(run.blocks, 'block')}, on {run.device}; run directory {run.run}"
    )
