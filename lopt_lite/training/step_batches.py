"""Which training examples each optimiser step has: for the run, and for its memory plan before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from lopt_lite.data.batches import Lengths, as_list, epoch_batches, micro_batches
from lopt_lite.residency.choices import MOST_MICRO_BATCH_TOKENS
from lopt_lite.residency.memory_model import LargestParts
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Stage
from lopt_lite.training.micro_batch_size import group_cost_tokens

#: The names of a stage's stretches of training, in order.
PHASES = ("head-fit", "train")
#: Pairs of examples that may share a micro-batch, in all steps of a run, that are gone through on paper: more take
#: seconds, and where steps are many the largest micro-batch comes near to the bound.
_MOST_PAIRS = 400_000


def epoch_steps(
    lengths: Lengths, *, batch_size: int, seed: int, stage: int, phase: str, epoch: int, steps: int
) -> list[list[int]]:
    """The examples of each optimiser step of an epoch (0 is the first), of ``steps`` in the whole phase.

    Parameters
    ----------
    lengths:
        Tokens of every training example: int64 [examples].
    seed:
        The run's.
    stage:
        The stage's number.
    """
    batches = epoch_batches(lengths, batch_size=batch_size, seed=(seed, "block", stage, phase, epoch))
    return batches[: max(0, steps - epoch * len(batches))]


class LargestMicroBatch:
    """How much passes through the layers at once in a run's steps, at most.

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
        self._batch_size, self._seed, self._lengths = settings.batch_size, settings.seed, lengths
        self._cost_tokens = group_cost_tokens(device)
        self._phases = tuple(_phases(settings, stages, len(lengths)))
        self._known: dict[int, LargestParts] = {}

    @functools.cached_property
    def is_quick(self) -> bool:
        """Whether finding it out takes less than a second or two."""
        examples = len(self._lengths)
        of_step = min(self._batch_size, examples)
        passes = sum(steps for _, _, steps in self._phases) * of_step
        if passes > _MOST_PAIRS:
            return False
        mean_length = max(1, sum(as_list(self._lengths)) // examples)
        return passes * min(of_step, MOST_MICRO_BATCH_TOKENS // mean_length + 1) <= _MOST_PAIRS

    def __call__(self, max_tokens: int) -> LargestParts:
        """Of micro-batches of at most ``max_tokens``.

        A longer example goes alone, and may be the largest.
        """
        if max_tokens not in self._known:
            # A tuple, so that drafts of the same run find out the same once. Here, as there may be very many lengths
            # where nobody asks.
            lengths = tuple(as_list(self._lengths))
            self._known[max_tokens] = _largest(
                lengths, self._batch_size, self._seed, self._phases, self._cost_tokens, max_tokens
            )
        return self._known[max_tokens]


@functools.lru_cache(maxsize=256)
def _largest(
    lengths: tuple[int, ...],
    batch_size: int,
    seed: int,
    phases: tuple[tuple[int, str, int], ...],
    cost_tokens: int,
    max_tokens: int,
) -> LargestParts:
    most_tokens = most_rows = most_pairs = 0
    for stage, phase, steps in phases:
        epoch = 0
        while found := epoch_steps(
            lengths, batch_size=batch_size, seed=seed, stage=stage, phase=phase, epoch=epoch, steps=steps
        ):
            epoch += 1
            for examples in found:
                pairs = 0
                for part in micro_batches(examples, lengths, max_tokens=max_tokens, cost_tokens=cost_tokens):
                    most_tokens = max(most_tokens, len(part) * lengths[part[0]])
                    most_rows = max(most_rows, len(part))
                    pairs += len(part) * lengths[part[0]] ** 2
                most_pairs = max(most_pairs, pairs)
    return LargestParts(most_tokens, most_rows, most_pairs)


def _phases(settings: TrainSettings, stages: Sequence[Stage], examples: int) -> Iterator[tuple[int, str, int]]:
    """(stage, phase, steps) of all that is trained."""
    counts = settings.step_counts(examples)
    for stage in stages:
        objectives = {block.objective for block in stage.blocks}
        if objectives == {"none"}:
            continue
        if "reconstruct" in objectives:
            yield stage.index, PHASES[0], counts.head_fit
        yield stage.index, PHASES[1], counts.train
