"""How much memory a way of working needs at its peak.

The parts are those of the design: resident layers, two slabs, one micro-batch's activations, trained parameters with
their optimiser state, the LM head or slices of it. The constants were fitted to measured peaks of the CPU build
(``benchmarks/prediction.py`` compares predicted and measured).
"""

from __future__ import annotations

from dataclasses import dataclass

from lopt_lite.residency.shapes import ModelShapes

MIB = 2**20

#: What libraries allocate on their first use, and what the allocator cannot give back, measured on the CPU build.
_CPU_OVERHEAD_BYTES = 96 * MIB
#: A reconstruction head: two matrices of hidden x hidden / 4.
_HEAD_SHARE = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be done, in tokens.

    Attributes
    ----------
    step_tokens:
        Most padded tokens of one optimiser step, 0 without training.
    longest:
        Tokens of the longest example.
    early_blocks:
        Whether there is a block that trains a reconstruction head.
    """

    step_tokens: int
    longest: int
    early_blocks: bool = False

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.step_tokens > 0

    def boundary_bytes(self, shapes: ModelShapes, block: tuple[int, int]) -> int:
        """Inputs of all layers of a block but the last, for one optimiser step."""
        return (block[1] - block[0] - 1) * self.step_tokens * shapes.hidden * shapes.itemsize


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
        return min(tokens, job.step_tokens) if job.trains else tokens

    def forward_tokens(self, job: Job) -> int:
        """Tokens that go through a layer at once without gradients, where only one layer's activations exist."""
        return 2 * self.micro_batch_tokens


def training_peak(
    shapes: ModelShapes, block: tuple[int, int], job: Job, layout: Layout, boundary_bytes: int, *, on_cpu: bool
) -> int:
    """Peak bytes of training ``block``, beyond what is used already, with ``boundary_bytes`` of boundaries kept."""
    micro = layout.micro_tokens(job)
    row = shapes.hidden * shapes.itemsize
    layers = block[1] - block[0]
    saved_layers = 1 if layout.recompute else layers
    inside = micro * (saved_layers * shapes.saved_bytes_per_token + shapes.transient_bytes_per_token)
    # Inputs of the block and of the layer at hand for all micro-batches, and their gradients.
    step = job.step_tokens * row * (3 if layout.recompute else 1)
    # Logits of a chunk with their softmax and gradient; or the local objective's activations in float32.
    local = 6 * micro * shapes.hidden * 4 if job.early_blocks else 0
    losses = max(_logit_bytes(shapes, layout), local)
    at_top = losses + inside
    return (
        _weights(shapes, block, layout)
        + _head(shapes, layout)
        + at_top
        + step
        + boundary_bytes
        + _state(shapes, block, job, layout)
        + (_CPU_OVERHEAD_BYTES if on_cpu else 0)
    )


def forward_peak(
    shapes: ModelShapes, block: tuple[int, int], job: Job, layout: Layout, group_tokens: int, *, on_cpu: bool
) -> int:
    """Peak bytes of a pass without gradients, with ``group_tokens`` of hidden states on the device."""
    tokens = max(layout.forward_tokens(job), job.longest)
    row = shapes.hidden * shapes.itemsize
    trained = 0.0
    if shapes.state_bytes_per_parameter and not layout.offload_state:
        trained = shapes.trained_parameters(*block) * (shapes.itemsize if shapes.full else 4)
    return int(
        _weights(shapes, block, layout)
        + _head(shapes, layout)
        + _logit_bytes(shapes, layout)
        + tokens * shapes.transient_bytes_per_token
        + 2 * max(group_tokens, tokens) * row
        + trained
        + (_CPU_OVERHEAD_BYTES if on_cpu else 0)
    )


def _weights(shapes: ModelShapes, block: tuple[int, int], layout: Layout) -> int:
    """Resident layers, the slabs of the others, and the matrix that is being dequantised."""
    layers = block[1] - block[0]
    workspace = 2 * shapes.largest_matrix * shapes.itemsize if shapes.quantised else 0
    whole = shapes.dense_bytes(*block) if layout.dequantised else shapes.stored_bytes(*block)
    resident = whole * layout.resident_layers // layers
    streams = layout.resident_layers < layers and not (shapes.full and shapes.state_bytes_per_parameter)
    return resident + (2 if streams else 1) * shapes.largest_shard + workspace


def _head(shapes: ModelShapes, layout: Layout) -> int:
    if layout.head_slice_rows is None:
        return shapes.head_bytes
    return 2 * layout.head_slice_rows * shapes.hidden * shapes.head_itemsize


def _logit_bytes(shapes: ModelShapes, layout: Layout) -> int:
    """Logits of a chunk in the compute dtype and in float32, their softmax and its gradient."""
    return layout.logit_elements * (2 * shapes.itemsize + 2 * 4)


def _state(shapes: ModelShapes, block: tuple[int, int], job: Job, layout: Layout) -> int:
    """Trained parameters with gradients and optimiser state."""
    state = shapes.state_bytes_per_parameter
    head = int(_HEAD_SHARE * shapes.hidden**2 * 16) if job.early_blocks else 0
    if layout.offload_state:
        return head + int(state * max(layer.trained_parameters for layer in shapes.layers))
    return head + int(state * shapes.trained_parameters(*block))
