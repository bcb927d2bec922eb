"""What each operation returns: plain records that the command line prints as text or as one JSON document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Base of all outcomes."""

    def to_json(self) -> dict[str, object]:
        """The outcome as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainOutcome(Outcome):
    """A finished run. Losses are held-out nats per answer token, None without ``--validation``."""

    run: str
    adapter: str
    already_done: bool
    examples: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    final_train_loss: float | None
    seconds: float
    device_peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class QuantizeOutcome(Outcome):
    """A finished store."""

    store: str
    already_done: bool
    shards: int
    source_bytes: int
    store_bytes: int
    unquantized: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BlockStatus(Outcome):
    """How far one block is."""

    block: int
    objective: str
    state: str  # "waiting", "training" or "done"
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StatusOutcome(Outcome):
    """What a run directory says of itself. ``seconds_left`` is an estimate, None before the first step."""

    run: str
    state: str  # "running", "stopped" or "done"
    pid: int | None
    model: str
    data: str
    store_done: bool
    blocks: tuple[BlockStatus, ...]
    next: str
    last_loss: float | None
    loss_before: float | None
    loss_after: float | None
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluateOutcome(Outcome):
    """Held-out loss in nats per answer token, and its exponential."""

    run: str
    data: str
    examples: int
    answer_tokens: int
    base_loss: float
    base_perplexity: float
    tuned_loss: float
    tuned_perplexity: float


@dataclass(frozen=True, kw_only=True)
class GenerateOutcome(Outcome):
    """One answer."""

    prompt: str
    text: str
    tokens: int
    tokens_per_s: float
    finished: bool


@dataclass(frozen=True, kw_only=True)
class ExportOutcome(Outcome):
    """What was written where."""

    out: str
    format: str
    onto: str | None
    bytes: int
