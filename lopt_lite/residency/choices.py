"""What stays on the device: decided once per run, from shapes and a budget, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from lopt_lite import devices
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.errors import DoesNotFitError
from lopt_lite.residency.layer_cost import LayerCost, measure_layer_cost
from lopt_lite.residency.pool import LayerPool, OnLayer, ResidentLayers
from lopt_lite.residency.streamed import StreamedLayers

MIB = 2**20

#: Share of the free memory that a run may take when no budget is named.
_FREE_SHARE = 0.7
#: Padded tokens of a micro-batch, largest first.
_MICRO_BATCH_TOKENS = (2048, 1024, 512, 256, 128)
#: Float32 logits of one chunk of answer tokens, in elements.
_LOGIT_ELEMENTS = (2**24, 2**22, 2**20)
#: What libraries allocate on their first use, and what the allocator cannot give back, measured on the CPU build.
_CPU_OVERHEAD_BYTES = 144 * MIB
#: AdamW in float32: parameter, gradient, two moments.
_BYTES_PER_TRAINED = 16


@dataclass(frozen=True)
class Residence:
    """Where the layers of a block are while they are worked on, and how much goes through them at once.

    Attributes
    ----------
    mode:
        ``"dequantised"`` (resident, 4-bit matrices turned into the compute dtype once), ``"resident"`` or
        ``"streamed"``.
    micro_batch_tokens:
        Padded tokens that go through a layer at once, forward and backward; a longer single example goes alone.
    logit_elements:
        Float32 logits of one chunk of answer tokens.
    predicted_bytes:
        Predicted peak of device memory (on the CPU: of the process).
    """

    mode: str
    micro_batch_tokens: int
    logit_elements: int
    predicted_bytes: int

    @property
    def forward_tokens(self) -> int:
        """Padded tokens of a batch in passes without gradients, which keep one layer's activations only."""
        return 2 * self.micro_batch_tokens

    @property
    def group_tokens(self) -> int:
        """Padded tokens of the batches that pass through a layer while it is loaded, without gradients."""
        return 8 * self.forward_tokens if self.mode == "streamed" else self.forward_tokens

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the journal."""
        return asdict(self)


def open_layers(
    residence: Residence,
    store: Store,
    skeleton: Skeleton,
    first: int,
    end: int,
    *,
    device: torch.device,
    on_layer: OnLayer | None = None,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> LayerPool:
    """The layers ``first`` to ``end`` (exclusive), as ``residence`` says. To be closed by the caller."""
    if residence.mode == "streamed":
        return StreamedLayers(store, skeleton, first, end, device=device, on_layer=on_layer, on_pass=on_pass)
    dequantize = residence.mode == "dequantised"
    return ResidentLayers(store, skeleton, first, end, device=device, dequantize=dequantize, on_layer=on_layer)


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


def used_bytes(device: torch.device) -> int:
    """Memory that the budget counts as used already: on the CPU the process, elsewhere nothing."""
    return devices.host_rss_bytes() if device.type == "cpu" else 0


def choose_residence(
    store: Store,
    skeleton: Skeleton,
    ranges: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    budget_bytes: int | None,
    step_tokens: int,
    longest: int,
    attach: OnLayer | None,
) -> Residence:
    """The fastest way of working within the budget.

    Parameters
    ----------
    ranges:
        (first layer, end layer) of each block.
    budget_bytes:
        Device memory the run may use; None for most of what is free.
    step_tokens:
        Most padded tokens of one optimiser step.
    longest:
        Tokens of the longest example.
    attach:
        Puts an adapter on a layer (for its cost); None for passes without training.

    Raises
    ------
    DoesNotFitError
        Nothing fits; names the smallest budget that would do.
    """
    used = used_bytes(device)
    budget = used + int(_FREE_SHARE * free_bytes(device)) if budget_bytes is None else budget_bytes
    cost = measure_layer_cost(skeleton, attach)
    smallest: Residence | None = None
    for mode in ("dequantised", "resident", "streamed"):
        if mode == "dequantised" and store.info.quantize == "none":
            continue
        for tokens in _MICRO_BATCH_TOKENS:
            for elements in _LOGIT_ELEMENTS:
                peak = used + _predict(
                    mode, store, skeleton, ranges, cost, device, max(tokens, longest), step_tokens, elements, attach
                )
                candidate = Residence(mode, tokens, elements, peak)
                if peak <= budget:
                    return candidate
                if smallest is None or peak < smallest.predicted_bytes:
                    smallest = candidate
    assert smallest is not None
    raise DoesNotFitError(
        f"a budget of {budget / MIB:,.0f} MiB is too small for this model and batch",
        expected=f"at least --memory {smallest.predicted_bytes / MIB * 1.02:.0f}MiB",
        fix="raise --memory, or lower --batch-size, --max-length or --lora-r, or use more --blocks",
    )


def _predict(
    mode: str,
    store: Store,
    skeleton: Skeleton,
    ranges: Sequence[tuple[int, int]],
    cost: LayerCost,
    device: torch.device,
    micro_tokens: int,
    step_tokens: int,
    logit_elements: int,
    attach: OnLayer | None,
) -> int:
    """Peak bytes of working on the most demanding block, beyond what is used already."""
    item = skeleton.dtype.itemsize
    hidden = skeleton.hidden_size
    layers = max(end - first for first, end in ranges)
    stored = max(store.layer_view(skeleton, i).nbytes for i in range(skeleton.layer_count))
    dense = max(_dense_bytes(skeleton, i) for i in range(skeleton.layer_count))
    workspace = 0 if store.info.quantize == "none" else 2 * cost.largest_matrix * item
    weights = {
        "dequantised": layers * dense + stored + workspace,
        "resident": layers * stored + workspace,
        "streamed": 2 * stored + workspace,
    }[mode]
    head = skeleton.vocabulary_rows * hidden * item
    # Logits in the compute dtype and in float32, their softmax and its gradient.
    logits = logit_elements * (2 * item + 2 * 4)
    transient = micro_tokens * cost.transient_bytes_per_token
    if attach is None:
        activations = transient + 2 * micro_tokens * hidden * item
        trained = 0
    else:
        depth = 1 if mode == "streamed" else layers
        activations = depth * micro_tokens * cost.saved_bytes_per_token + transient
        # Boundaries of a streamed block, the micro-batches' inputs, and the local objective in float32.
        activations += (layers if mode == "streamed" else 1) * max(step_tokens, micro_tokens) * hidden * item
        activations += 6 * micro_tokens * hidden * 4
        trained = _BYTES_PER_TRAINED * (layers * cost.trained_parameters + hidden * hidden // 2)
    overhead = _CPU_OVERHEAD_BYTES if device.type == "cpu" else 0
    return weights + head + logits + activations + trained + overhead


def _dense_bytes(skeleton: Skeleton, index: int) -> int:
    shapes = skeleton.layer_parameters(index).values()
    return sum(torch.Size(shape).numel() for shape in shapes) * skeleton.dtype.itemsize
