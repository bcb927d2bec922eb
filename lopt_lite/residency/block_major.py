"""A whole model's held-out loss with only one block on the device at a time.

Each block is loaded once; all batches pass through it, and its outputs wait in host memory for the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.events import OnEvent, Progress, ignore
from lopt_lite.residency.head import answer_loss_sum, place_head
from lopt_lite.residency.pool import MicroBatch, OnLayer, ResidentLayers

#: Told which variant (index) the layers will run next, to switch adapters on or off.
SelectVariant = Callable[[list[nn.Module], int], None]


@torch.no_grad()
def held_out_losses(
    store: Store,
    skeleton: Skeleton,
    dataset: TokenizedDataset,
    ranges: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    dequantize: bool,
    pad_token_id: int,
    max_tokens: int,
    max_rows: int,
    variants: int = 1,
    on_layer: OnLayer | None = None,
    select: SelectVariant | None = None,
    check: Callable[[], None] = lambda: None,
    on_event: OnEvent = ignore,
    task: str = "held-out loss",
) -> list[float]:
    """Mean loss per answer token of each variant of the model, in nats.

    Parameters
    ----------
    ranges:
        (first layer, end layer) of each block, first to last.
    max_tokens, max_rows:
        Largest batch.
    variants:
        How many versions of the model to run side by side through each loaded block.
    select:
        Called before a variant runs through the loaded layers.
    check:
        Called between batches; may raise to stop.

    Returns
    -------
    list of float
        One mean loss per variant.
    """
    batches = length_sorted_batches(dataset.lengths, max_tokens=max_tokens, max_rows=max_rows)
    waiting: list[list[torch.Tensor]] = []
    sums = [0.0] * variants
    answer_tokens = int(dataset.target_counts.sum())
    place_head(skeleton, store, device)
    total = len(batches) * len(ranges)
    for number, (first, end) in enumerate(ranges):
        last = number == len(ranges) - 1
        with ResidentLayers(
            store, skeleton, first, end, device=device, dequantize=dequantize, on_layer=on_layer
        ) as pool:
            for b, indices in enumerate(batches):
                check()
                batch = collate(dataset, indices, pad_token_id)
                recording = skeleton.record(batch.input_ids.to(device), embed=number == 0)
                outputs = []
                for variant in range(variants):
                    if select is not None:
                        select(pool.layers, variant)
                    hidden = recording.hidden if number == 0 else waiting[b][variant].to(device)
                    output = pool.forward(MicroBatch(hidden, recording.calls))
                    if last:
                        sums[variant] += answer_loss_sum(skeleton, output, batch.targets.to(device))
                    else:
                        outputs.append(output.cpu())
                if number == 0:
                    waiting.append(outputs)
                else:
                    waiting[b] = outputs
                on_event(Progress(task=task, done=number * len(batches) + b + 1, total=total, unit="batches"))
    return [s / max(answer_tokens, 1) for s in sums]
