"""What stays on the device: decided once per run, from shapes and a budget, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lopt_lite import devices
from lopt_lite.errors import DoesNotFitError, RunDirectoryError
from lopt_lite.residency.memory_model import Job, Layout, forward_peak, training_peak
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.residency.spill import SpillLimits

MIB = 2**20

#: How far below the budget a prediction stays, which may be a little too low.
_MARGIN_MIB = 8
#: On a GPU, at least so much of the budget: its limit counts what the allocator holds, holes and rounding included.
_GPU_MARGIN_SHARE = 0.08
#: By how much a process's size varies when it starts, and what reading data and a tokenizer takes.
_SLACK_MIB = 8
#: Share of the free memory that a run may take when no budget is named.
_FREE_SHARE = 0.7
#: Share of the free host memory that what a GPU puts aside, and caches kept in memory, may take.
_HOST_SHARE = 0.6
#: Caches that are read at the same time, at most: a block's inputs, its targets, and the anchor's.
_CACHES = 3
#: Most padded tokens of a micro-batch, but for a longer single example.
MOST_MICRO_BATCH_TOKENS = 2048
#: Padded tokens of a micro-batch, largest first; small ones make small products, which are slow.
_ROOMY_TOKENS = (MOST_MICRO_BATCH_TOKENS, 1024, 512)
_TIGHT_TOKENS = (256, 128)
#: The process beside a GPU, once all libraries are loaded.
_LIBRARIES_BYTES = 700 * MIB
#: Logits of one chunk of answer tokens, in elements.
_LOGIT_ELEMENTS = (2**24, 2**22, 2**20)
#: Tokens of a chunk where memory is plenty, however large the vocabulary is: products of few rows are slow.
_ROOMY_LOGIT_TOKENS = 256
#: A slice of the LM head, in bytes.
_HEAD_SLICE_BYTES = 64 * MIB
#: How many times the tokens of one forward batch may pass through a layer while it is loaded.
_LARGEST_GROUP = 8


@dataclass(frozen=True)
class Residence:
    """Where everything is while a block is worked on, and how much goes through it at once.

    Attributes
    ----------
    layers:
        Layers of the largest block.
    resident_layers:
        How many of them stay on the device; the others are streamed.
    dequantised:
        Whether 4-bit matrices are turned into the compute dtype when they are loaded (those that stay: once), instead
        of in every product.
    recompute:
        Whether a layer's forward is run again for its backward pass (always, when layers are streamed), so that only
        one layer's activations exist.
    micro_batch_tokens:
        Padded tokens that go through a layer at once, forward and backward; a longer single example goes alone.
    forward_tokens, group_tokens:
        In passes without gradients: padded tokens that go through a layer at once, and while it is loaded.
    logit_elements:
        Logits of one chunk of answer tokens.
    head_slice_rows:
        Rows of the LM head that are on the device at once, None for all.
    boundary_bytes, boundary_host_bytes:
        Activations between layers that are kept on the device, and in host memory; the rest goes to a scratch file.
    offload_state:
        Whether trained parameters and their optimiser state are on the device only while their layer is.
    cache_keep_bytes:
        An activation cache up to this size is kept in host memory once it is read.
    predicted_bytes:
        Predicted peak of device memory (on the CPU: of the process).
    predicted_host_bytes:
        Predicted peak of the process; on the CPU the same.
    state_host_bytes:
        Of trained parameters and optimiser state that are put aside, what is kept in host memory; the rest goes to a
        scratch file.
    """

    layers: int
    resident_layers: int
    dequantised: bool
    recompute: bool
    micro_batch_tokens: int
    forward_tokens: int
    group_tokens: int
    logit_elements: int
    head_slice_rows: int | None
    boundary_bytes: int
    boundary_host_bytes: int
    offload_state: bool
    cache_keep_bytes: int
    predicted_bytes: int
    predicted_host_bytes: int
    state_host_bytes: int = 0

    @property
    def mode(self) -> str:
        """``"dequantised"``, ``"resident"``, ``"recomputed"``, ``"partly streamed"`` or ``"streamed"``."""
        if self.resident_layers == 0:
            return "streamed"
        if self.resident_layers < self.layers:
            return "partly streamed"
        if self.recompute:
            return "recomputed"
        return "dequantised" if self.dequantised else "resident"

    @property
    def boundary_limits(self) -> SpillLimits:
        """Where activations put aside may be."""
        return SpillLimits(self.boundary_bytes, self.boundary_host_bytes)

    @property
    def state_limits(self) -> SpillLimits:
        """Where trained parameters and their optimiser state may be while their layer is away."""
        return SpillLimits(0, self.state_host_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return {"mode": self.mode, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Residence:
        """What :meth:`to_json` wrote, among other things.

        Raises
        ------
        RunDirectoryError
            Another release wrote it.
        """
        if "state_host_bytes" not in values:
            # Earlier versions kept all of it in host memory; on the CPU, where both peaks are one, none.
            on_cpu = values.get("predicted_bytes") == values.get("predicted_host_bytes")
            values = {**values, "state_host_bytes": 0 if on_cpu else 1 << 62}
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise RunDirectoryError(
                f"the run's journal does not say {', '.join(missing)}",
                fix="continue with the release of lopt-lite that began the run, or start anew with --fresh",
            )
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Memory:
    """What there is, in bytes.

    Attributes
    ----------
    budget_bytes:
        What the run may use of the device: what the user named, as far as it is to be had; None for most of what is
        free.
    used_bytes, free_bytes:
        What the budget counts as used already (on the CPU the process), and what could still be allocated.
    free_host_bytes:
        What could still be allocated on the host.
    named_bytes:
        The budget as the user named it.
    reached_bytes:
        What reading data and tokenizer has taken, at most, as the budget counts it; 0 where that is not known.
    """

    budget_bytes: int | None
    used_bytes: int
    free_bytes: int
    free_host_bytes: int
    named_bytes: int | None = None
    reached_bytes: int = 0

    @classmethod
    def now(cls, device: torch.device, budget_bytes: int | None, *, reached_bytes: int = 0) -> Memory:
        """As it is at this moment."""
        return cls(
            None if budget_bytes is None else devices.backend(device).attainable_bytes(budget_bytes),
            devices.used_bytes(device),
            devices.free_bytes(device),
            devices.free_bytes(torch.device("cpu")),
            budget_bytes,
            reached_bytes,
        )

    @property
    def least_bytes(self) -> int:
        """The smallest budget that reading data and tokenizer keeps, in bytes; whole MiB."""
        return (self.reached_bytes // MIB + _SLACK_MIB) * MIB if self.reached_bytes else 0

    def with_budget(self, budget_bytes: int) -> Memory:
        """The same with another budget, for a part of what is done after reading."""
        return replace(self, budget_bytes=budget_bytes, reached_bytes=0)

    def check_not_exceeded(self, smallest_bytes: Callable[[], int], *, fix: str) -> None:
        """Refuse a budget that was exceeded before anything began.

        Parameters
        ----------
        smallest_bytes:
            Finds out the smallest budget that would do.
        fix:
            What the user can do.

        Raises
        ------
        DoesNotFitError
            Reading data and tokenizer has taken more.
        """
        if self.budget_bytes is None or self.reached_bytes <= self.budget_bytes:
            return
        raise DoesNotFitError(
            f"a budget of {self.budget_bytes // MIB:,} MiB is too small: reading the tokenizer and what else is given "
            f"took {self.reached_bytes // MIB:,} MiB",
            expected=f"at least --memory {smallest_bytes() // MIB}MiB",
            fix=fix,
        )

    @property
    def limit_bytes(self) -> int:
        """The budget, or what stands for it."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        return self.used_bytes + int(_FREE_SHARE * self.free_bytes)


def choose_residence(
    shapes: ModelShapes,
    ranges: Sequence[tuple[int, int]],
    job: Job,
    *,
    device: torch.device,
    memory: Memory,
    instead: str = "lower --batch-size, --max-length or --lora-r, or use more --blocks",
) -> Residence:
    """The fastest way of working within the budget.

    Parameters
    ----------
    ranges:
        (first layer, end layer) of each block.
    job:
        What is to be done.
    instead:
        What the user can do other than to give more memory.

    Raises
    ------
    DoesNotFitError
        Nothing fits; names the smallest budget that would do.
    """
    blocks = _unlike(shapes, ranges)
    for layout in _layouts(shapes, _depth(blocks), job):
        fitted = _fit(layout, shapes, blocks, job, device, memory)
        if isinstance(fitted, Residence):
            memory.check_not_exceeded(
                lambda: smallest_budget(shapes, ranges, job, device=device, memory=memory),
                fix="raise --memory, or give less data",
            )
            return fitted
    smallest = smallest_budget(shapes, ranges, job, device=device, memory=memory)
    named, more = "", "raise --memory"
    if memory.named_bytes is not None and memory.limit_bytes < memory.named_bytes:
        named = f" (of {memory.named_bytes / MIB:,.0f} MiB named, no more is free)"
        more = "end what else uses the device"
    raise DoesNotFitError(
        f"a budget of {memory.limit_bytes / MIB:,.0f} MiB{named} is too small for this model and batch",
        expected=f"at least --memory {smallest // MIB}MiB",
        fix=f"{more}, or {instead}",
    )


def smallest_budget(
    shapes: ModelShapes, ranges: Sequence[tuple[int, int]], job: Job, *, device: torch.device, memory: Memory
) -> int:
    """The smallest budget, in bytes, with which :func:`choose_residence` surely finds a way; whole MiB."""
    blocks = _unlike(shapes, ranges)
    nothing = replace(memory, budget_bytes=0)
    needs = [_fit(layout, shapes, blocks, job, device, nothing) for layout in _layouts(shapes, _depth(blocks), job)]
    # A process that begins a little larger than this one did must not be refused in its turn.
    smallest = (-(-min(need for need in needs if isinstance(need, int)) // MIB) + _SLACK_MIB) * MIB
    return max(smallest, memory.least_bytes)


def _unlike(shapes: ModelShapes, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The blocks, of those that are alike only one."""
    return list({shapes.layers[slice(*block)]: block for block in ranges}.values())


def _depth(blocks: Sequence[tuple[int, int]]) -> int:
    """Layers of the largest block."""
    return max(end - first for first, end in blocks)


def _layouts(shapes: ModelShapes, layers: int, job: Job) -> Iterator[Layout]:
    """Ways of working, the fastest first.

    Whole graphs first, since recomputing costs a third more; then as many resident layers as fit with micro-batches of
    a good size; then streaming with less and less on the device.
    """
    forms = (True, False) if shapes.quantised else (False,)
    roomy = _ROOMY_LOGIT_TOKENS * shapes.vocabulary
    logit_elements = (roomy, *_LOGIT_ELEMENTS) if roomy > _LOGIT_ELEMENTS[0] else _LOGIT_ELEMENTS

    def all_resident(tokens: tuple[int, ...], *, recompute: bool) -> Iterator[Layout]:
        for dequantised in forms:
            for micro in tokens:
                for elements in logit_elements:
                    yield Layout(layers, dequantised, recompute, micro, elements, None, False)

    yield from all_resident(_ROOMY_TOKENS, recompute=False)
    if job.trains:
        yield from all_resident(_ROOMY_TOKENS, recompute=True)
        yield from all_resident(_TIGHT_TOKENS, recompute=False)
    slice_rows = max(1, _HEAD_SLICE_BYTES // (shapes.hidden * shapes.head.stored.itemsize))
    # A head that is trained is there as a whole.
    sliced = (None, slice_rows) if slice_rows < shapes.vocabulary and not job.around_bytes else (None,)
    for tokens in (_ROOMY_TOKENS, _TIGHT_TOKENS):
        for offload in _offloads(shapes, job):
            for rows in sliced:
                for dequantised in forms:
                    for micro in tokens:
                        for elements in logit_elements:
                            yield Layout(0, dequantised, True, micro, elements, rows, offload)


def _offloads(shapes: ModelShapes, job: Job) -> tuple[bool, ...]:
    """Whether trained state may stay, or may leave, when layers are streamed. Weights that are trained are state."""
    if not shapes.state_bytes_per_parameter:
        return (False,)
    return (True,) if shapes.full and job.trains else (False, True)


def _fit(
    layout: Layout,
    shapes: ModelShapes,
    blocks: Sequence[tuple[int, int]],
    job: Job,
    device: torch.device,
    memory: Memory,
) -> Residence | int:
    """``layout`` with the rest of the budget made use of, or the bytes it would need."""
    on_cpu = device.type == "cpu"
    layers = _depth(blocks)

    def within(candidate: Layout, block: tuple[int, int]) -> Layout:
        return replace(candidate, resident_layers=min(candidate.resident_layers, block[1] - block[0]))

    def training(candidate: Layout, boundary_bytes: int) -> int:
        return max(
            training_peak(shapes, block, job, within(candidate, block), boundary_bytes, on_cpu=on_cpu)
            for block in blocks
        )

    def passing(candidate: Layout, group_tokens: int) -> int:
        return max(
            forward_peak(shapes, block, job, within(candidate, block), group_tokens, on_cpu=on_cpu) for block in blocks
        )

    def peak(candidate: Layout, boundary_bytes: int) -> int:
        trained = training(candidate, boundary_bytes) if job.trains else 0
        return memory.used_bytes + max(trained, passing(candidate, candidate.forward_tokens))

    share = 0.0 if on_cpu else _GPU_MARGIN_SHARE
    limit = min(memory.limit_bytes - _MARGIN_MIB * MIB, int((1 - share) * memory.limit_bytes))
    needed = peak(layout, 0)
    if needed > limit:
        return max(needed + _MARGIN_MIB * MIB, math.ceil(needed / (1 - share)))
    boundaries = max(job.boundary_bytes(shapes, b) for b in blocks) if layout.recompute and job.trains else 0
    kept = min(boundaries, limit - needed)
    if layout.resident_layers == 0 and not shapes.full:
        for resident in range(layers - 1, 0, -1):
            candidate = replace(layout, resident_layers=resident)
            if peak(candidate, kept) <= limit:
                layout = candidate
                break
    forward_tokens = layout.forward_tokens
    group_tokens = forward_tokens
    predicted = peak(layout, kept)
    if layout.resident_layers < layers:
        for factor in range(_LARGEST_GROUP, 1, -1):
            tokens = factor * forward_tokens
            grouped = memory.used_bytes + passing(layout, tokens)
            if grouped <= max(predicted, memory.used_bytes if job.trains else limit):
                group_tokens, predicted = tokens, max(predicted, grouped)
                break
    host = _host_places(shapes, blocks, job, layout, boundaries - kept, device=device, memory=memory)
    return Residence(
        layers=layers,
        resident_layers=layout.resident_layers,
        dequantised=layout.dequantised,
        recompute=layout.recompute,
        micro_batch_tokens=layout.micro_batch_tokens,
        forward_tokens=forward_tokens,
        group_tokens=group_tokens,
        logit_elements=layout.logit_elements,
        head_slice_rows=layout.head_slice_rows,
        boundary_bytes=kept,
        boundary_host_bytes=host.boundaries,
        offload_state=layout.offload_state,
        cache_keep_bytes=host.cache_keep,
        predicted_bytes=predicted,
        predicted_host_bytes=predicted if on_cpu else _LIBRARIES_BYTES + 2 * shapes.largest_shard + host.taken,
        state_host_bytes=host.state,
    )


@dataclass(frozen=True)
class _HostPlaces:
    """What may be in host memory, in bytes, and how much of it is taken."""

    state: int
    boundaries: int
    cache_keep: int
    taken: int


def _host_places(
    shapes: ModelShapes,
    blocks: Sequence[tuple[int, int]],
    job: Job,
    layout: Layout,
    put_aside: int,
    *,
    device: torch.device,
    memory: Memory,
) -> _HostPlaces:
    """Host memory for what has no room on a GPU: first what each step reads and writes most of.

    ``put_aside``: activations between layers, in bytes.
    """
    left = 0 if devices.takes_host_memory(device) else int(_HOST_SHARE * memory.free_host_bytes)
    trained = max(shapes.trained_parameters(*block) for block in blocks) if layout.offload_state else 0
    state = min(left, int(shapes.state_bytes_per_parameter * trained))
    boundaries = min(left - state, max(0, put_aside))
    cache_keep = (left - state - boundaries) // _CACHES
    caches = (1 + job.matches + (job.anchored_tokens > 0)) * job.cache_bytes if job.cache_bytes <= cache_keep else 0
    return _HostPlaces(state, boundaries, cache_keep, state + boundaries + caches)
