"""The anchor: which tokens hold the model to what it knew, and what the untouched model made of them.

Before training, the untouched model's final hidden states at a seeded sample of *prompt* tokens are cached; while the
last block trains, the divergence of its predictions there from the untouched model's is part of its loss. The sample is
fixed, so the cache is small, and is written once (in shards, each a durable fact).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from lopt_lite.data.dataset import Batch, TokenizedDataset
from lopt_lite.data.seeding import permutation
from lopt_lite.residency import head_cost
from lopt_lite.residency.anchors import Anchors
from lopt_lite.residency.memory_model import FORWARD_ROWS
from lopt_lite.training.activation_cache import ActivationCache, CacheLayout
from lopt_lite.training.block_inputs import BlockInputs
from lopt_lite.training.block_plan import Block
from lopt_lite.training.job import nothing_to_anchor
from lopt_lite.training.untouched import UntouchedPass
from lopt_lite.training.workbench import Workbench


class AnchorSample:
    """The anchored tokens of every example: training examples and those that are only there to anchor on.

    A token counts as anchored at the position that predicts the token after it. Positions that predict an answer are
    the task's. Where the untouched model has answered some prompts itself, these answers are anchored, whole, and not
    the prompts of the training examples.

    Parameters
    ----------
    dataset, train_count, others:
        As :class:`Workbench` has them; held-out examples, which are between the two, are not anchored.
    most:
        Tokens of one example.
    seed:
        Decides the sample.
    answered, answer_tokens:
        The last of ``others``: those that end with an answer of the untouched model, and its tokens.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        train_count: int,
        others: range,
        *,
        most: int,
        seed: int,
        answered: range = range(0),
        answer_tokens: int = 0,
    ) -> None:
        self.examples = [*others] if answered else [*range(train_count), *others]
        self.others, self.answered, self.answer_tokens = others, answered, answer_tokens
        self._seed, self._train_count = seed, train_count
        self._dataset, self._most = dataset, most
        self.counts = torch.zeros(len(dataset), dtype=torch.int64)
        for example in self.examples:
            most_here = answer_tokens if example in answered else min(most, len(self._eligible(example)))
            self.counts[example] = most_here

    @property
    def holds_anything(self) -> bool:
        """Whether there is a token to anchor."""
        return bool(self.counts.any())

    def _eligible(self, example: int) -> np.ndarray:
        _, is_target = self._dataset.example(example)
        return np.flatnonzero(~is_target[1:].numpy())

    def positions(self, example: int) -> torch.Tensor:
        """Anchored positions of an example, ascending: int64 [count]."""
        if not self.counts[example]:
            return torch.empty(0, dtype=torch.int64)
        if example in self.answered:
            last = len(self._dataset.example(example)[0]) - 1
            return torch.arange(last - self.answer_tokens, last)
        eligible = self._eligible(example)
        if len(eligible) > self._most:
            chosen = permutation(len(eligible), (self._seed, "anchor", example))[: self._most]
            eligible = eligible[np.sort(chosen)]
        return torch.from_numpy(eligible)

    @functools.cached_property
    def reach(self) -> torch.Tensor:
        """int64 [examples]: tokens of each example up to its last anchored one, 0 where none is.

        What comes after them, its answer for the most part, changes nothing at them.
        """
        reach = torch.zeros(len(self._dataset), dtype=torch.int64)
        for example in self.examples:
            if self.counts[example]:
                reach[example] = self.positions(example)[-1] + 1
        return reach

    def compared(self, vocabulary: int) -> torch.Tensor:
        """The tokens of a vocabulary among which predictions are compared: int64, ascending.

        All, up to :data:`head_cost.COMPARED_TOKENS`. Of more, those that the examples have, the most frequent first, up
        to half of so many, and then the first of the vocabulary: tokenizers begin with what is frequent everywhere.
        """
        most = head_cost.COMPARED_TOKENS
        if vocabulary <= most:
            return torch.arange(vocabulary)
        # Counted where they lie: a copy would be as large as the data.
        counts = sum(
            torch.bincount(self._dataset.stretch(examples), minlength=vocabulary)
            for examples in (range(self._train_count), self.others)
        )
        present = torch.argsort(counts, descending=True, stable=True)[: int((counts > 0).sum())]
        chosen = torch.zeros(vocabulary, dtype=torch.bool)
        chosen[present[: most // 2]] = True
        others = torch.nonzero(~chosen).flatten()
        chosen[others[: most - int(chosen.sum())]] = True
        return torch.nonzero(chosen).flatten()

    def mask(self, batch: Batch) -> torch.Tensor:
        """bool [rows, longest]: True at anchored positions of a batch."""
        mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, example in enumerate(batch.examples.tolist()):
            mask[row, self.positions(example)] = True
        return mask

    def others_of_step(self, step: int, rows: int) -> list[int]:
        """``rows`` of the examples that are only there to anchor on: round after round, each in its own order."""
        chosen = []
        for number in range(step * rows, (step + 1) * rows):
            order = permutation(len(self.others), (self._seed, "other text", number // len(self.others)))
            chosen.append(self.others[int(order[number % len(self.others)])])
        return chosen


def anchor_layout(bench: Workbench, sample: AnchorSample) -> CacheLayout:
    """Where the untouched model's final hidden states at anchored tokens lie."""
    return CacheLayout(
        sample.reach,
        hidden_size=bench.skeleton.hidden_size,
        dtype=bench.skeleton.dtype,
        max_tokens=bench.residence.forward_tokens,
        max_rows=FORWARD_ROWS,
        kept=sample.counts,
    )


class AnchorReader:
    """Makes the anchors of a batch from the cache.

    Attributes
    ----------
    weight:
        What they count for beside the task's loss; None until it is found out (:mod:`.from_answers`).

    Raises
    ------
    ModelError
        The cache cannot be read.
    """

    def __init__(self, bench: Workbench, sample: AnchorSample) -> None:
        self.sample = sample
        self._device, self.weight = bench.device, bench.settings.retain
        self._cache = ActivationCache(
            bench.paths.anchors, anchor_layout(bench, sample), keep_bytes=bench.residence.cache_keep_bytes
        )

    def anchors(self, batch: Batch, *, tokens: int) -> Anchors:
        """The anchors of a micro-batch, on the device.

        Parameters
        ----------
        tokens:
            Anchored tokens of the whole optimiser step.
        """
        assert self.weight is not None
        return Anchors(
            mask=self.sample.mask(batch).to(self._device),
            base=self._cache.rows(batch.examples.tolist()).to(self._device),
            tokens=max(1, tokens),
            weight=self.weight,
        )

    def close(self) -> None:
        """Close the cache's files."""
        self._cache.close()


def check_anchored(sample: AnchorSample) -> None:
    """Refuse an anchor without anything to hold on to.

    Raises
    ------
    DataError
        No token can be anchored.
    """
    if not sample.holds_anything:
        raise nothing_to_anchor()


def needs_untouched_pass(blocks: Sequence[Block]) -> bool:
    """Whether the inputs of the last block will no longer be those of the untouched model."""
    return any(block.objective != "none" for block in blocks[:-1])


def write_anchors(bench: Workbench, sample: AnchorSample, blocks: Sequence[Block], inputs: BlockInputs) -> None:
    """Pass all anchored examples through the untouched ``blocks``, up to the last, and cache what is anchored on.

    Each passes only as far as it is anchored. Of a cache that was finished before, damaged shards are written again.

    Parameters
    ----------
    blocks:
        Those that ``inputs`` are not yet the outputs of.

    Raises
    ------
    StoppedError, DoesNotFitError
        See :meth:`UntouchedPass.write`.
    """
    untouched = UntouchedPass(
        bench,
        bench.paths.anchors,
        anchor_layout(bench, sample),
        fact="anchors",
        shard_fact="anchor-shard",
        what="what the untouched model says",
        dataset=bench.dataset.beginnings(sample.reach),
        # Earlier versions passed whole examples, and put them in another order.
        of="prompts",
    )
    if not untouched.stands():
        untouched.write(
            bench.store,
            [(block.first, block.end) for block in blocks],
            inputs,
            residence=bench.residence,
            rows_of=functools.partial(_anchored_rows, sample),
        )


def _anchored_rows(sample: AnchorSample, batch: Batch, output: torch.Tensor) -> torch.Tensor:
    """The anchored positions of ``output`` [rows, longest, hidden], moved to the front: [rows, most, hidden]."""
    examples = batch.examples.tolist()
    positions = [sample.positions(example) for example in examples]
    front = output.new_zeros(len(examples), max(len(p) for p in positions), output.shape[-1])
    for row, of_row in enumerate(positions):
        front[row, : len(of_row)] = output[row, of_row.to(output.device)]
    return front
