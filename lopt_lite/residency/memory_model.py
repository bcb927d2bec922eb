"""How much memory a way of working needs at its peak.

The parts are those of the design: resident layers, two slabs, one micro-batch's activations, trained parameters with
their optimiser state, the LM head or slices of it. ``benchmarks/prediction.py`` compares the sum with measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lopt_lite import float32_products
from lopt_lite.residency import head_cost, short_attention
from lopt_lite.residency.shapes import ModelShapes

MIB = 2**20

#: Most examples of a batch in passes without gradients.
FORWARD_ROWS = 64
#: What libraries allocate on their first use, and what the allocator cannot give back, fitted on the CPU build.
_CPU_OVERHEAD_BYTES = 42 * MIB
#: More of it in full tuning.
_FULL_OVERHEAD_BYTES = 12 * MIB
#: More of it when many small tensors go to a file and come back.
_OFFLOAD_OVERHEAD_BYTES = 22 * MIB
#: A layer's modules, adapters and names as Python objects.
_LAYER_OBJECTS_BYTES = 320 << 10
#: Workspaces of CUDA's libraries and rounding of its allocator: an estimate.
_GPU_OVERHEAD_BYTES = 96 * MIB
#: What updating a bfloat16 or float32 matrix with Adam needs for a moment, per element of it, measured on the CPU.
_UPDATE_BYTES = 20
#: Activations of the reconstruction head, in float32 values per token and hidden unit.
_RECONSTRUCTION_VALUES = 6
#: Two shards of an activation cache: one is filled while the other is written.
_CACHE_BUFFERS_BYTES = 64 * MIB


class LargestParts(NamedTuple):
    """The largest micro-batches of a run's steps, in padded tokens and in examples, and the step with most pairs of
    tokens: of those of the rows of all its micro-batches.
    """

    tokens: int
    rows: int
    step_pairs: int


@dataclass(frozen=True)
class Job:
    """What is to be done, in tokens.

    Attributes
    ----------
    step_tokens:
        Most padded tokens of one optimiser step, 0 without training.
    longest:
        Tokens of the longest example.
    rows, forward_rows:
        Most examples of one optimiser step, and of a batch of a pass without gradients.
    shortest:
        Tokens of the shortest examples, from short to long, as many as may pass together; empty where they are not
        known.
    answer_tokens:
        Most answer tokens of one optimiser step; None when any token may be one.
    measured_tokens:
        Most answer tokens of one batch of a pass that measures losses without training; 0 where there is none, None
        when any token may be one.
    all_tokens:
        Padded tokens of all examples together; None when they are many.
    at_once:
        Padded tokens that pass through a layer at once without training, whatever the way of working says; 0 where it
        decides.
    early_blocks:
        Whether there is a block that trains a reconstruction head.
    cache_bytes:
        Size of one activation cache, 0 when there is only one block.
    matches:
        Whether there is a block that matches targets read from a cache.
    anchored_tokens:
        Most anchored tokens of one optimiser step, 0 without an anchor.
    graph_layers:
        Layers between two gradient boundaries, where blocks are trained together; None where there is one block at a
        time.
    around_bytes:
        Trained embedding, final norm and LM head with gradients and optimiser state; 0 where they are frozen.
    generates:
        Whether transformers' own loop continues prompts, which pads rows on the left.
    held_out:
        Whether losses are measured without training while there is an optimiser's state.
    largest_micro_batch:
        Given how many padded tokens may pass through a layer at once in a step: upper bounds on what does. None where
        that is not known: as many tokens as may, and as many examples as the step has.
    """

    step_tokens: int
    longest: int
    rows: int = 0
    forward_rows: int = FORWARD_ROWS
    shortest: tuple[int, ...] = ()
    answer_tokens: int | None = None
    measured_tokens: int | None = None
    all_tokens: int | None = None
    at_once: int = 0
    early_blocks: bool = False
    matches: bool = False
    cache_bytes: int = 0
    anchored_tokens: int = 0
    graph_layers: int | None = None
    around_bytes: int = 0
    generates: bool = False
    held_out: bool = False
    largest_micro_batch: Callable[[int], LargestParts] | None = None

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.step_tokens > 0

    def rows_among(self, tokens: int, most: int) -> int:
        """Most examples, of ``most`` at most, that go through a layer at once among so many padded ``tokens``.

        The longest of n examples has no fewer tokens than the nth of the shortest ones.
        """
        if not self.shortest:
            return min(most, tokens)
        fitting = sum(rows * length <= tokens for rows, length in enumerate(self.shortest[:most], start=1))
        return max(1, fitting)

    def answers_among(self, tokens: int) -> int:
        """Most answer tokens among ``tokens`` that go through a layer at once in a step."""
        return tokens if self.answer_tokens is None else min(tokens, self.answer_tokens)

    def measured_among(self, tokens: int) -> int:
        """As :meth:`answers_among`, in a pass that only measures."""
        return tokens if self.measured_tokens is None else min(tokens, self.measured_tokens)

    def present(self, tokens: int) -> int:
        """How many of ``tokens`` there can be."""
        return tokens if self.all_tokens is None else min(tokens, self.all_tokens)

    def depth(self, block: tuple[int, int]) -> int:
        """Layers that one gradient passes through."""
        layers = block[1] - block[0]
        return layers if self.graph_layers is None else min(layers, self.graph_layers)

    def boundary_bytes(self, shapes: ModelShapes, block: tuple[int, int]) -> int:
        """Inputs of all layers of a block but the last, for one optimiser step."""
        return (self.depth(block) - 1) * self.step_tokens * shapes.hidden * shapes.itemsize


@dataclass(frozen=True)
class Layout:
    """A way of working; the fields are those of :class:`~lopt_lite.residency.choices.Residence`."""

    resident_layers: int
    dequantised: bool
    recompute: bool
    micro_batch_tokens: int
    logit_elements: int
    head_slice_rows: int | None
    offload_state: bool

    def micro_tokens(self, job: Job) -> int:
        """Tokens that may really go through a layer at once: a long example goes alone, a step may be smaller."""
        tokens = max(self.micro_batch_tokens, job.longest)
        if not job.trains:
            return tokens
        if job.largest_micro_batch is not None:
            return job.largest_micro_batch(self.micro_batch_tokens).tokens
        return min(tokens, job.step_tokens)

    def micro_rows(self, job: Job) -> int:
        """Examples that may go through a layer at once in a step."""
        if job.largest_micro_batch is not None:
            return job.largest_micro_batch(self.micro_batch_tokens).rows
        return job.rows_among(self.micro_tokens(job), job.rows)

    def waiting_pairs(self, job: Job) -> int:
        """Pairs of tokens of all rows of a step: its micro-batches are there until it is done."""
        if job.largest_micro_batch is not None:
            return job.largest_micro_batch(self.micro_batch_tokens).step_pairs
        return job.step_tokens * job.longest

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through a layer at once without gradients, where only one layer's activations exist."""
        return 2 * self.micro_batch_tokens


def around_state_bytes(shapes: ModelShapes) -> int:
    """A trained embedding and LM head: the embedding's values, gradients of both, their moments in float32.

    Also what updating one of them needs for a moment.
    """
    elements = shapes.vocabulary * shapes.hidden
    # The head's gradient of a chunk is a second one beside their sum.
    return elements * (2 * shapes.itemsize + 2 * (shapes.itemsize + 8) + _UPDATE_BYTES)


def training_parts(
    shapes: ModelShapes,
    block: tuple[int, int],
    job: Job,
    layout: Layout,
    boundary_bytes: int,
    *,
    last: bool,
    on_cpu: bool,
) -> dict[str, int]:
    """What there is at the peak of training ``block``, in bytes, beyond what is used already.

    Parameters
    ----------
    block:
        The layers that are on the device, or pass over it, together: those of one block, or of all of them where blocks
        are trained together.
    boundary_bytes:
        Activations between layers that are kept on the device.
    last:
        Whether the block has the LM head, or a reconstruction head of its own.
    """
    micro = layout.micro_tokens(job)
    row_bytes = shapes.hidden * shapes.itemsize
    layers, together = block[1] - block[0], job.graph_layers is not None
    depth = 1 if layout.recompute else job.depth(block)
    rows = layout.micro_rows(job)
    saved = shapes.kept_bytes(*block, depth=depth, tokens=micro, rows=rows, row_length=job.longest)
    if not shapes.full:
        # Adapters compute with copies of their float32 values in the compute dtype.
        adapters = shapes.trained_parameters(*block) // layers * depth
        saved += adapters * shapes.itemsize
    if last:
        answers = job.answers_among(micro)
        anchored = min(micro, job.anchored_tokens)
        losses = _loss_bytes(shapes, layout, answers, gradient=True)
        if anchored:
            kept = head_cost.answer_bytes(shapes.head, answers, layout.head_slice_rows, gradient=True)
            losses = max(losses, kept + _comparing_bytes(shapes, layout, anchored))
        losses += micro * row_bytes
        if on_cpu:
            # oneDNN copies a product's operand into an order of its own.
            losses += _logit_elements(shapes, layout, answers) * shapes.itemsize
    else:
        losses = _RECONSTRUCTION_VALUES * micro * shapes.hidden * 4
    inside = shapes.inside_bytes(*block, tokens=micro, rows=rows, row_length=job.longest)
    if on_cpu:
        length = min(job.longest, short_attention.LONGEST)
        scores = short_attention.transient_bytes(-(-micro // length), length, shapes.short_attention_heads)
        inside = max(inside, scores)
    # Inputs of the block, and of the layer at hand with their gradients; and what is read for the next step.
    copies = (3 if layout.recompute else 1) + (1 if job.cache_bytes or together else 0)
    copies += 1 if job.matches and not last else 0
    values, gradients = _state(shapes, block, layout, all_gradients=together and not layout.offload_state)
    reconstruction = shapes.hidden**2 // 2 * 16 * (-(-layers // job.depth(block)) - 1 if together else 1)
    reconstruction *= job.early_blocks
    # A block that is worked on layer by layer has all its gradients only at its bottom, where no boundary is left.
    at_top = losses + boundary_bytes if layout.recompute else losses + gradients
    masks = shapes.masks.kept_bytes(layout.waiting_pairs(job), job.longest)
    return {
        "weights": _weights(shapes, block, layout),
        "head": _heads(shapes, layout, job, reconstruction, last=last, together=together and job.early_blocks),
        "activations": max(saved + max(at_top, inside + gradients), shapes.masks.making_bytes(job.longest)),
        "hidden states": copies * job.step_tokens * row_bytes + masks,
        "trained": values + job.around_bytes,
        "overhead": _overhead(shapes, layout, layers, on_cpu=on_cpu),
    }


def _heads(shapes: ModelShapes, layout: Layout, job: Job, reconstruction: int, *, last: bool, together: bool) -> int:
    """The LM head or a reconstruction head; both where blocks are trained together."""
    if together:
        return _head(shapes, layout, job) + reconstruction
    return _head(shapes, layout, job) if last else reconstruction


def training_peak(
    shapes: ModelShapes, block: tuple[int, int], job: Job, layout: Layout, boundary_bytes: int, *, on_cpu: bool
) -> int:
    """The sum of :func:`training_parts` for the kind of block that needs more."""
    kinds = (True, False) if job.early_blocks or job.matches else (True,)
    return max(
        sum(training_parts(shapes, block, job, layout, boundary_bytes, last=last, on_cpu=on_cpu).values())
        for last in kinds
    )


def forward_peak(
    shapes: ModelShapes, block: tuple[int, int], job: Job, layout: Layout, group_tokens: int, *, on_cpu: bool
) -> int:
    """Peak bytes of a pass without gradients, with ``group_tokens`` of hidden states on the device."""
    tokens = job.present(max(layout.forward_tokens, job.longest, job.at_once))
    row = shapes.hidden * shapes.itemsize
    trained = 0
    if shapes.state_bytes_per_parameter:
        trained = _values(shapes, block, layout)
        if job.held_out:
            trained = _state(shapes, block, layout)[0] + job.around_bytes
    rows = job.rows_among(tokens, job.forward_rows)
    inside = shapes.inside_bytes(*block, tokens=tokens, rows=rows, row_length=job.longest)
    inside += shapes.adapting_bytes(*block, tokens=tokens)
    losses = _loss_bytes(shapes, layout, job.measured_among(tokens), gradient=False)
    group = job.present(max(group_tokens, tokens))
    masks = shapes.masks.kept_bytes(group * job.longest, job.longest)
    if job.generates and (rows > 1 or shapes.masks.are_made(job.longest)):
        # A dense mask of all rows, and attention's copy of it in its own dtype.
        masks += (1 + shapes.itemsize) * tokens * job.longest
    return (
        _weights(shapes, block, layout)
        + _head(shapes, layout, job)
        + max(losses, inside, shapes.masks.making_bytes(job.longest))
        + 2 * group * row
        + masks
        + trained
        + (min(_CACHE_BUFFERS_BYTES, 2 * job.cache_bytes) if on_cpu else 0)
        + _overhead(shapes, layout, block[1] - block[0], on_cpu=on_cpu)
    )


def _weights(shapes: ModelShapes, block: tuple[int, int], layout: Layout) -> int:
    """Resident layers, the slabs of the others, and the matrix that is being dequantised."""
    layers = block[1] - block[0]
    whole = shapes.dense_bytes(*block) if layout.dequantised else shapes.stored_bytes(*block)
    resident = whole * layout.resident_layers // layers
    if shapes.full and shapes.state_bytes_per_parameter:
        # Counted with what is trained; the slabs they came through are gone by then.
        return 0
    streams = layout.resident_layers < layers
    # In 4 bits, the matrix at hand is dequantised.
    loading = 2 * shapes.largest_shard if streams else 0
    if layout.dequantised and streams:
        loading += max(layer.dense_bytes for layer in shapes.layers)
    at_hand = 0 if layout.dequantised or not shapes.quantised else shapes.largest_matrix * shapes.itemsize
    return resident + loading + at_hand


def _logit_elements(shapes: ModelShapes, layout: Layout, answers: int) -> int:
    """Logits of one chunk: never more than there are answer tokens for."""
    rows = shapes.vocabulary if layout.head_slice_rows is None else min(shapes.vocabulary, layout.head_slice_rows)
    return max(min(layout.logit_elements, answers * rows), rows)


def _head(shapes: ModelShapes, layout: Layout, job: Job) -> int:
    """The LM head, and the anchor's own part of it."""
    compared = head_cost.head_bytes(shapes.head.compared, None) if job.anchored_tokens else 0
    return head_cost.head_bytes(shapes.head, layout.head_slice_rows) + compared


def _loss_bytes(shapes: ModelShapes, layout: Layout, answers: int, *, gradient: bool) -> int:
    """Everything that making the losses of a micro-batch needs."""
    elements = _logit_elements(shapes, layout, answers)
    return (
        head_cost.logit_bytes(shapes.head, elements, layout.head_slice_rows, gradient=gradient)
        + head_cost.norm_bytes(shapes.head, elements, layout.head_slice_rows, gradient=gradient)
        + head_cost.answer_bytes(shapes.head, answers, layout.head_slice_rows, gradient=gradient)
    )


def _comparing_bytes(shapes: ModelShapes, layout: Layout, anchored: int) -> int:
    """Everything that comparing two models' predictions of a micro-batch's anchored tokens needs."""
    head = shapes.head.compared
    # A chunk has both models' logits of half as many tokens.
    elements = max(min(layout.logit_elements, 2 * anchored * head.rows), 2 * head.rows)
    return (
        head_cost.logit_bytes(head, elements, None, gradient=True)
        + head_cost.norm_bytes(head, elements, None, gradient=True)
        + head_cost.anchor_bytes(head, anchored)
    )


def _values(shapes: ModelShapes, block: tuple[int, int], layout: Layout) -> int:
    """Trained parameters alone."""
    one_layer = max(layer.trained_parameters for layer in shapes.layers)
    return _value_bytes(shapes) * (one_layer if layout.offload_state else shapes.trained_parameters(*block))


def _value_bytes(shapes: ModelShapes) -> int:
    """Bytes of a trained number: adapters are float32."""
    return shapes.itemsize if shapes.full else 4


def _state(
    shapes: ModelShapes, block: tuple[int, int], layout: Layout, *, all_gradients: bool = False
) -> tuple[int, int]:
    """Trained parameters with their optimiser state, and their gradients."""
    one_layer = max(layer.trained_parameters for layer in shapes.layers)
    all_layers = shapes.trained_parameters(*block)
    item = _value_bytes(shapes)
    # A gradient is as large as what it is of.
    alone = _values(shapes, block, layout)
    values = int(shapes.state_bytes_per_parameter / item * alone) - alone
    if not shapes.full:
        return values, alone
    # Layers are updated one by one, and matrices one by one within them, unless all are clipped together.
    gradients = item * (one_layer if layout.recompute and not all_gradients else all_layers)
    return values, gradients + _UPDATE_BYTES * shapes.largest_matrix


def _overhead(shapes: ModelShapes, layout: Layout, depth: int, *, on_cpu: bool) -> int:
    """What belongs to no part: libraries, allocators, Python's objects."""
    if not on_cpu:
        return _GPU_OVERHEAD_BYTES
    offloading = _OFFLOAD_OVERHEAD_BYTES if layout.offload_state else 0
    full = _FULL_OVERHEAD_BYTES if shapes.full else 0
    # The type of the activations is that of the products.
    in_float32 = shapes.itemsize == 2 and float32_products.needed(torch.device("cpu"))
    products = float32_products.SCRATCH_BYTES if in_float32 else 0
    return _CPU_OVERHEAD_BYTES + offloading + full + products + _LAYER_OBJECTS_BYTES * depth
