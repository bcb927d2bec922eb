"""A whole model's passes without training, with only one block on the device at a time: what the held-out loss, the
anchor, targets and tasks are made of.

Each block is loaded once; all batches pass through it, and its outputs wait for the next block: in memory as far as
they may, else in a scratch file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    batches = length_sorted_batches(dataset.lengths, max_tokens=residence.forward_tokens, max_rows=max_rows)
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

    def embedded(batch: Batch) -> MicroBatch:
        recording = skeleton.record(batch.input_ids.to(device), embed=True)
        return MicroBatch(recording.hidden, recording.calls)

    def on_pass() -> None:
        nonlocal done
        check()
        done += 1
        on_event(Progress(task=task, done=done, total=total, unit="batches"))

    collated = _Collated(dataset, batches, pad_token_id)

    def take(number: int, variant: int, output: torch.Tensor) -> None:
        sums[variant] += head.loss_sum(output, collated[number].targets.to(device))

    with contextlib.closing(head):
        pass_variants(
            store,
            skeleton,
            collated,
            ranges,
            embedded,
            take,
            device=device,
            residence=residence,
            spill_limits=spill_limits,
            spill_directory=spill_directory,
            variants=variants,
            on_layer=on_layer,
            state=state,
            select=select,
            on_pass=on_pass,
        )
    return [s / max(answer_tokens, 1) for s in sums]


class _Collated(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    def __init__(self, dataset: TokenizedDataset, batches: list[list[int]], pad_token_id: int) -> None:
        self._dataset, self._batches, self._pad_token_id = dataset, batches, pad_token_id

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        return collate(self._dataset, self._batches[number], self._pad_token_id)


def pass_blocks(
    store: Store,
    skeleton: Skeleton,
    batches: Sequence[Batch],
    ranges: Sequence[tuple[int, int]],
    first_input: Callable[[Batch], MicroBatch],
    on_output: Callable[[int, torch.Tensor], None],
    **kwargs: Any,
) -> None:
    """As :func:`pass_variants` with one variant, whose number ``on_output`` is not told."""
    pass_variants(
        store,
        skeleton,
        batches,
        ranges,
        first_input,
        lambda number, variant, output: on_output(number, output),
        **kwargs,
    )


@torch.no_grad()
def pass_variants(
    store: Store,
    skeleton: Skeleton,
    batches: Sequence[Batch],
    ranges: Sequence[tuple[int, int]],
    first_input: Callable[[Batch], MicroBatch],
    on_output: Callable[[int, int, torch.Tensor], None],
    *,
    device: torch.device,
    residence: Residence,
    spill_limits: SpillLimits,
    spill_directory: Path,
    variants: int = 1,
    on_layer: OnLayer | None = None,
    state: LayerState | None = None,
    select: SelectVariant | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> None:
    """Pass batches through block after block, each block being loaded once.

    Parameters
    ----------
    first_input:
        Makes the first block's input of a batch.
    on_output:
        Gets the last block's outputs: number of the batch, variant, [rows, tokens, hidden].
    spill_limits, spill_directory, variants, on_layer, state, select:
        See :func:`held_out_losses`.
    on_pass:
        Called before a batch's output of a block is handed on; may raise to stop.

    Raises
    ------
    DoesNotFitError
        The disk of ``spill_directory`` is full.
    """
    sizes = [batch.input_ids.numel() for batch in batches]
    groups_of_batches = _groups_of_sizes(sizes, residence.group_tokens)
    with Spill(spill_limits, spill_directory, device) as waiting:
        for place, (first, end) in enumerate(ranges):
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
                    entering = [_entering(skeleton, batches[b], first_input, place, device) for b in group]
                    for variant in range(variants):
                        if select is not None:
                            select(pool.layers, variant)

                        def take(
                            position: int,
                            output: torch.Tensor,
                            group: list[int] = group,
                            variant: int = variant,
                            last: bool = place == len(ranges) - 1,
                        ) -> None:
                            on_pass()
                            if last:
                                on_output(group[position], variant, output)
                            else:
                                waiting.put((group[position], variant), output)

                        inputs = entering
                        if place:
                            inputs = [
                                MicroBatch(waiting.take((b, variant)), batch.calls)
                                for b, batch in zip(group, entering, strict=True)
                            ]
                        pool.forward_all(inputs, take)
            finally:
                pool.close()


def _entering(
    skeleton: Skeleton, batch: Batch, first_input: Callable[[Batch], MicroBatch], place: int, device: torch.device
) -> MicroBatch:
    """What enters the first block; of later ones only the layers' arguments."""
    if place == 0:
        return first_input(batch)
    recording = skeleton.record(batch.input_ids.to(device), embed=False)
    return MicroBatch(recording.hidden, recording.calls)


def groups(batches: Sequence[Sequence[int]], lengths: torch.Tensor, max_tokens: int) -> list[list[int]]:
    """Numbers of consecutive batches that together hold at most ``max_tokens`` padded tokens (or are one batch)."""
    sizes = lengths.tolist()
    return _groups_of_sizes([len(batch) * max(sizes[i] for i in batch) for batch in batches], max_tokens)


def _groups_of_sizes(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As :func:`groups`, of batches with so many padded tokens."""
    found: list[list[int]] = []
    held = 0
    for number, tokens in enumerate(sizes):
        if not found or held + tokens > max_tokens:
            found.append([])
            held = 0
        found[-1].append(number)
        held += tokens
    return found
