"""A whole model's held-out loss with only one block on the device at a time.

Each block is loaded once; all batches pass through it, and its outputs wait for the next block: in memory as far as
they may, else in a scratch file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.data.dataset import Batch, TokenizedDataset, collate
from lopt_lite.events import OnEvent, Progress, ignore
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.head import open_head
from lopt_lite.residency.layers import open_layers
from lopt_lite.residency.pool import LayerState, MicroBatch, OnLayer
from lopt_lite.residency.spill import Spill, SpillLimits

#: Hidden states that may wait in memory: little beside any budget, and enough for a handful of examples.
WAITING = SpillLimits(device_bytes=16 << 20, host_bytes=16 << 20)

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
    residence: Residence,
    pad_token_id: int,
    max_rows: int,
    spill_limits: SpillLimits,
    spill_directory: Path,
    variants: int = 1,
    on_layer: OnLayer | None = None,
    state: LayerState | None = None,
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
    residence:
        Where the layers are, and the largest batch in tokens.
    max_rows:
        The largest batch in examples.
    spill_limits, spill_directory:
        How much of the outputs that wait for the next block may be in memory, and where the others' file is made.
    variants:
        How many versions of the model to run side by side through each loaded block.
    on_layer, state:
        See :func:`open_layers`.
    select:
        Called before a variant runs through the loaded layers.
    check:
        Called between batches; may raise to stop.

    Raises
    ------
    DoesNotFitError
        The disk of ``spill_directory`` is full.

    Returns
    -------
    list of float
        One mean loss per variant.
    """
    lengths = dataset.lengths
    batches = length_sorted_batches(lengths, max_tokens=residence.forward_tokens, max_rows=max_rows)
    groups_of_batches = groups(batches, lengths, residence.group_tokens)
    sums = [0.0] * variants
    answer_tokens = int(dataset.target_counts.sum())
    total = len(batches) * len(ranges) * variants
    done = 0
    head = open_head(
        skeleton,
        store,
        device=device,
        logit_elements=residence.logit_elements,
        slice_rows=residence.head_slice_rows,
    )
    with contextlib.closing(head), Spill(spill_limits, spill_directory, device) as waiting:
        for number, (first, end) in enumerate(ranges):
            last = number == len(ranges) - 1
            pool = open_layers(
                residence,
                store,
                skeleton,
                first,
                end,
                device=device,
                scratch=spill_directory,
                on_layer=on_layer,
                state=state,
            )
            try:
                for group in groups_of_batches:
                    collated = {b: collate(dataset, batches[b], pad_token_id) for b in group}
                    recordings = {
                        b: skeleton.record(batch.input_ids.to(device), embed=number == 0)
                        for b, batch in collated.items()
                    }
                    for variant in range(variants):
                        if select is not None:
                            select(pool.layers, variant)

                        def take(
                            position: int,
                            output: torch.Tensor,
                            group: list[int] = group,
                            collated: dict[int, Batch] = collated,
                            variant: int = variant,
                            last: bool = last,
                        ) -> None:
                            nonlocal done
                            check()
                            b = group[position]
                            if last:
                                targets = collated[b].targets.to(device)
                                sums[variant] += head.loss_sum(output, targets)
                            else:
                                waiting.put((b, variant), output)
                            done += 1
                            on_event(Progress(task=task, done=done, total=total, unit="batches"))

                        inputs = [recordings[b].hidden if number == 0 else waiting.take((b, variant)) for b in group]
                        pool.forward_all(
                            [MicroBatch(hidden, recordings[b].calls) for hidden, b in zip(inputs, group, strict=True)],
                            take,
                        )
            finally:
                pool.close()
    return [s / max(answer_tokens, 1) for s in sums]


def groups(batches: Sequence[Sequence[int]], lengths: torch.Tensor, max_tokens: int) -> list[list[int]]:
    """Numbers of consecutive batches that together hold at most ``max_tokens`` padded tokens (or are one batch)."""
    sizes = lengths.tolist()
    found: list[list[int]] = []
    held = 0
    for number, batch in enumerate(batches):
        tokens = len(batch) * max(sizes[i] for i in batch)
        if not found or held + tokens > max_tokens:
            found.append([])
            held = 0
        found[-1].append(number)
        held += tokens
    return found
