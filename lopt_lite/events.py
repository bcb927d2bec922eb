"""What a long operation tells while it works.

Every operation of the package takes ``on_event``, a callable that receives these records in order. They carry plain
values only, so that one listener can draw a progress display and another print JSON. Nothing in the package prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    def to_json(self) -> dict[str, object]:
        """The event as plain JSON values with its ``event`` name."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something the user should know: a fallback, dropped examples, a library's limit.

    Attributes
    ----------
    text:
        One sentence.
    ordinary:
        It tells what was decided, and is no warning.
    """

    text: str
    ordinary: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """A countable job other than training steps: ``done`` of ``total`` ``unit``s."""

    task: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """What a run is going to do, decided before anything is loaded. See :class:`~lopt_lite.outcomes.PlanMemory`."""

    mode: str
    layers: int
    resident_layers: int
    recompute: bool
    micro_batch_tokens: int
    step_tokens: int
    budget_bytes: int
    predicted_bytes: int
    predicted_host_bytes: int
    disk_bytes: int
    seconds: float
    device: str
    advice: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The run directory is locked and its settings are known."""

    run: str
    model: str
    data: str
    examples: int
    validation_examples: int
    tokens: int
    answer_tokens: int
    blocks: int
    layers: int
    device: str
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class BlockStarted(Event):
    """Training of one block begins or goes on at ``step``."""

    block: int
    blocks: int
    objective: str
    first_layer: int
    end_layer: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimiser step is done. ``phase`` is ``"head-fit"`` or ``"train"``; losses are nats or mean squared error.

    ``block`` is 0 where all blocks are trained together; then ``loss`` is the task's, and ``reconstruction_loss`` the
    mean of the early blocks' (else None). ``retain_kl``: divergence from the untouched model in nats per anchored
    token, None without an anchor.
    """

    block: int
    phase: str
    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    device_peak_bytes: int
    host_rss_bytes: int
    time: float
    reconstruction_loss: float | None = None
    retain_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Validation(Event):
    """Held-out loss in nats per answer token. ``epoch`` is 0 for the untouched model."""

    epoch: int
    epochs: int
    loss: float
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A block's state in mid-training is durable."""

    block: int
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlockDone(Event):
    """A block's adapter is durable."""

    block: int
    blocks: int


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener that listens to nothing."""
