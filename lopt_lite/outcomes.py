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
    """A finished run. Losses are held-out nats per answer token, None without ``--validation``.

    ``adapter`` is the directory of the PEFT adapter, or None and ``tuned_model`` that of the checkpoint, if the model
    was tuned in full.
    """

    run: str
    adapter: str | None
    tuned_model: str | None = None
    already_done: bool
    examples: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    final_train_loss: float | None
    seconds: float
    device_peak_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanMemory(Outcome):
    """Where everything is, and the peaks that follow, in bytes.

    ``mode`` is one of ``"dequantised"``, ``"resident"``, ``"recomputed"``, ``"partly streamed"``, ``"streamed"``. Of
    the activations between layers that a step keeps (``boundary_bytes``), some are on the device, some in host memory,
    and the rest in a scratch file.
    """

    mode: str
    layers: int
    resident_layers: int
    recompute: bool
    offload_state: bool
    head_sliced: bool
    micro_batch_tokens: int
    boundary_bytes: int
    boundary_device_bytes: int
    boundary_host_bytes: int
    budget_bytes: int
    smallest_budget_bytes: int
    predicted_bytes: int
    predicted_host_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanDisk(Outcome):
    """Disk space, in bytes. ``checkpoints_bytes`` counts two of them, which there are for a moment.

    ``blocks_bytes`` is what each block leaves, its adapter or its tuned layers; ``result_bytes`` the adapter or the
    whole checkpoint put together from them (``result``: ``"adapter"`` or ``"model"``). These stay side by side. What is
    only there while blocks train is gone by then, so that ``total_bytes``, which leaves out a store that exists, is
    less than the sum.
    """

    store: str
    store_exists: bool
    store_bytes: int
    caches_bytes: int
    checkpoints_bytes: int
    scratch_bytes: int
    blocks_bytes: int
    result: str
    result_bytes: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanBlock(Outcome):
    """Seconds of one block, and the part of its steps spent waiting for layers."""

    block: int
    objective: str
    first_layer: int
    end_layer: int
    load_s: float
    targets_s: float
    head_fit_s: float
    train_s: float
    held_out_s: float
    cache_s: float
    total_s: float
    waiting_share: float


@dataclass(frozen=True, kw_only=True)
class PlanAlternative(Outcome):
    """Another budget, or other blocks. Where it does not fit, only ``smallest_budget_bytes`` is known."""

    options: str
    chosen: bool
    fits: bool
    mode: str
    smallest_budget_bytes: int
    predicted_bytes: int | None
    disk_bytes: int | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class PlanOutcome(Outcome):
    """What ``train`` would do with the same options; nothing was done.

    ``data_how`` says how tokens were found out: ``"counted"``, ``"sampled"`` or ``"from bytes"``. ``hiding_tokens`` is
    how many tokens a step needs for streamed layers to load beside the computing, None where nothing is streamed.
    """

    command: str
    run: str
    model: str
    architecture: str
    parameters: int
    layers: int
    weights_found: bool
    data: str
    data_how: str
    examples: int
    held_out_examples: int
    tokens: int
    answer_tokens: int
    longest_tokens: int
    device: str
    steps_per_epoch: int
    steps: int
    batch_size: int
    step_tokens: int
    hiding_tokens: int | None
    memory: PlanMemory
    disk: PlanDisk
    store_s: float
    held_out_before_s: float
    anchor_s: float
    blocks: tuple[PlanBlock, ...]
    total_s: float
    advice: tuple[str, ...]
    alternatives: tuple[PlanAlternative, ...]


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
class ReportOutcome(Outcome):
    """A written report. ``picture`` is None before the first step, when there are no curves to draw.

    Held-out losses and ``final_train_loss`` (the mean of the last steps) are nats per answer token; ``loss_after`` is
    there once the last epoch is done. ``device_peak_bytes`` is the most that was measured so far.
    """

    run: str
    report: str
    picture: str | None
    state: str  # "running", "stopped" or "done"
    next: str
    seconds_left: float | None
    loss_before: float | None
    loss_after: float | None
    final_train_loss: float | None
    device_peak_bytes: int | None
    predicted_bytes: int | None
    notices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaskScore(Outcome):
    """What both models score in one metric of one task (or group of tasks) of lm-eval, with standard errors.

    ``group`` is the group that the task is part of, ``filter`` the way in which answers were read (None where there is
    one way). ``higher_is_better`` and the standard errors are None where lm-eval does not tell them.
    """

    task: str
    group: str | None
    metric: str
    filter: str | None
    higher_is_better: bool | None
    examples: int
    base: float
    base_stderr: float | None
    tuned: float
    tuned_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluateOutcome(Outcome):
    """Held-out loss in nats per answer token, and its exponential; None without data. And what tasks gave.

    ``device_peak_bytes`` is the peak of device memory (on the CPU: of the process) from the first model loaded on.
    """

    run: str
    data: str | None = None
    examples: int | None = None
    answer_tokens: int | None = None
    base_loss: float | None = None
    base_perplexity: float | None = None
    tuned_loss: float | None = None
    tuned_perplexity: float | None = None
    tasks: tuple[TaskScore, ...] = ()
    device_peak_bytes: int = 0


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
