"""Which training examples each optimiser step has: for the run, and for its memory plan before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lopt_lite.data.batches import Lengths, as_list, epoch_batches, micro_batches
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Stage
from lopt_lite.training.micro_batch_size import group_cost_tokens

#: The names of a stage's stretches of training, in order.
PHASES = ("head-fit", "train")
#: Passes of examples through a run that are gone through on paper: more take seconds, and come near to the bound.
_MOST_EXAMPLES = 50_000


def epoch_steps(
    lengths: Lengths, settings: TrainSettings, *, stage: int, phase: str, epoch: int, steps: int
) -> list[list[int]]:
    """The examples of each optimiser step of an epoch (0 is the first), of ``steps`` in the whole phase.

    Parameters
    ----------
    lengths:
        Tokens of every training example: int64 [examples].
    stage:
        The stage's number.
    """
    seed = (settings.seed, "block", stage, phase, epoch)
    batches = epoch_batches(lengths, batch_size=settings.batch_size, seed=seed)
    return batches[: max(0, steps - epoch * len(batches))]


class LargestMicroBatch:
    """Most padded tokens that pass through the layers at once in the optimiser steps of a run.

    With few examples, or few long ones, that is far less than there is room for: batches are of similar lengths.

    Parameters
    ----------
    settings:
        The run's.
    stages:
        What is trained at the same time.
    lengths:
        Tokens of every training example, in the order of the data: int64 [examples].
    device:
        Where the layers are computed: decides how much padding is worth another micro-batch.
    """

    def __init__(
        self, settings: TrainSettings, stages: Sequence[Stage], lengths: Lengths, device: torch.device
    ) -> None:
        self._settings, self._stages, self._lengths = settings, stages, lengths
        self._cost_tokens = group_cost_tokens(device)
        self._known: dict[int, int] = {}

    @property
    def is_quick(self) -> bool:
        """Whether finding it out takes less than a second or two."""
        of_step = min(self._settings.batch_size, len(self._lengths))
        return sum(steps for _, _, steps in self._phases()) * of_step <= _MOST_EXAMPLES

    def __call__(self, max_tokens: int) -> int:
        """Of micro-batches of at most ``max_tokens``; a longer example goes alone, and may be the largest."""
        if max_tokens not in self._known:
            self._known[max_tokens] = max(self._sizes(max_tokens), default=0)
        return self._known[max_tokens]

    def _sizes(self, max_tokens: int) -> Iterator[int]:
        # Here, as there may be very many where nobody asks.
        lengths = as_list(self._lengths)
        for examples in self._steps(lengths):
            for part in micro_batches(examples, lengths, max_tokens=max_tokens, cost_tokens=self._cost_tokens):
                yield len(part) * lengths[part[0]]

    def _steps(self, lengths: list[int]) -> Iterator[list[int]]:
        for stage, phase, steps in self._phases():
            epoch = 0
            while found := epoch_steps(lengths, self._settings, stage=stage, phase=phase, epoch=epoch, steps=steps):
                yield from found
                epoch += 1

    def _phases(self) -> Iterator[tuple[int, str, int]]:
        """(stage, phase, steps) of all that is trained."""
        counts = self._settings.step_counts(len(self._lengths))
        for stage in self._stages:
            objectives = {block.objective for block in stage.blocks}
            if objectives == {"none"}:
                continue
            if "reconstruct" in objectives:
                yield stage.index, PHASES[0], counts.head_fit
            yield stage.index, PHASES[1], counts.train
