"""Tokenised examples without padding, and rectangular batches of them.

Examples are never packed: a row of a batch holds one example, padded on the right, so that under causal attention
nothing can leak from one example to another and positions start at 0 in each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lopt_lite.data.seeding import permutation
from lopt_lite.errors import DataError

#: Label at positions without a target; what torch's cross-entropy ignores.
IGNORED = -100
#: Tokens that are worked on at once: their positions take several times as much memory as they do.
_PIECE_TOKENS = 2**20


def check_can_be_split(examples: int) -> None:
    """Refuse to hold out a part of less than two examples.

    Raises
    ------
    DataError
        There are fewer.
    """
    if examples < 2:
        raise DataError(
            f"the data has {examples} example, which cannot be split for validation",
            fix="give more examples, a validation file, or leave --validation out",
        )


def held_out_count(examples: int, fraction: float) -> int:
    """How many of at least two ``examples`` are held out: ``fraction`` of them, and at least one on each side."""
    return min(max(round(examples * fraction), 1), examples - 1)


def split_examples(examples: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and the validation examples, each ascending; see :meth:`TokenizedDataset.split`."""
    held_out = held_out_count(examples, fraction)
    order = permutation(examples, (seed, "validation split"))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@dataclass(frozen=True)
class TokenizedDataset:
    """All examples, one after the other.

    Attributes
    ----------
    tokens:
        int32 [total tokens].
    is_target:
        bool [total tokens]: True where the token is to be predicted. Never at an example's first token.
    offsets:
        int64 [examples + 1]: example i is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor
    offsets: torch.Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each example: int64 [examples]."""
        return self.offsets.diff()

    @property
    def target_counts(self) -> torch.Tensor:
        """Tokens to be predicted in each example: int64 [examples]."""
        counts = torch.zeros(len(self), dtype=torch.int64)
        for examples in _pieces(self.offsets):
            piece = self.part(examples)
            before = torch.zeros(piece.is_target.numel() + 1, dtype=torch.int64)
            torch.cumsum(piece.is_target, 0, dtype=torch.int64, out=before[1:])
            counts[examples.start : examples.stop] = before[piece.offsets].diff()
        return counts

    def example(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one example's tokens (int32) and targets (bool), both [length]."""
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[begin:end], self.is_target[begin:end]

    def stretch(self, examples: range) -> torch.Tensor:
        """A view of the tokens of examples that follow each other: int32 [their tokens]."""
        return self.tokens[int(self.offsets[examples.start]) : int(self.offsets[examples.stop])]

    def select(self, indices: Sequence[int] | torch.Tensor) -> TokenizedDataset:
        """The examples named, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        # Only of these: a batch must not cost a pass over the lengths of the whole data set.
        return self._stretches(self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen])

    def beginnings(self, lengths: torch.Tensor) -> TokenizedDataset:
        """The first tokens of every example: int64 [examples], so many, at most all."""
        return self._stretches(self.offsets[:-1], lengths)

    def _stretches(self, starts: torch.Tensor, lengths: torch.Tensor) -> TokenizedDataset:
        """Examples of ``lengths`` tokens from ``starts`` on, both int64 [examples]."""
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        total = int(offsets[-1])
        made = TokenizedDataset(self.tokens.new_empty(total), self.is_target.new_empty(total), offsets)
        moved_by = starts - offsets[:-1]
        for examples in _pieces(offsets):
            here = slice(examples.start, examples.stop)
            there = slice(int(offsets[examples.start]), int(offsets[examples.stop]))
            positions = torch.arange(there.start, there.stop)
            positions += moved_by[here].repeat_interleave(lengths[here])
            torch.index_select(self.tokens, 0, positions, out=made.tokens[there])
            torch.index_select(self.is_target, 0, positions, out=made.is_target[there])
        return made

    def part(self, examples: range) -> TokenizedDataset:
        """A view of examples that follow each other."""
        there = slice(int(self.offsets[examples.start]), int(self.offsets[examples.stop]))
        offsets = self.offsets[examples.start : examples.stop + 1] - self.offsets[examples.start]
        return TokenizedDataset(self.tokens[there], self.is_target[there], offsets)

    @staticmethod
    def join(parts: Sequence[TokenizedDataset]) -> tuple[TokenizedDataset, list[TokenizedDataset]]:
        """The examples of all parts, one part after the other, and a view of each part of them.

        With the views in their place, the parts that were given can be let go.
        """
        if len(parts) == 1:
            return parts[0], list(parts)
        lengths = torch.cat([part.lengths for part in parts])
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        tokens, is_target = (
            torch.cat(values) for values in zip(*((p.tokens, p.is_target) for p in parts), strict=True)
        )
        whole = TokenizedDataset(tokens, is_target, offsets)
        ends = list(itertools.accumulate(map(len, parts)))
        return whole, [whole.part(range(end - len(part), end)) for end, part in zip(ends, parts, strict=True)]

    def without_targets(self) -> TokenizedDataset:
        """The same examples with no token to be predicted."""
        return TokenizedDataset(self.tokens, torch.zeros_like(self.is_target), self.offsets)

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over tokens, targets and offsets: equal for equal data on any machine."""
        digest = hashlib.sha256()
        for tensor, kind in ((self.tokens, "<i4"), (self.is_target.view(torch.uint8), "|u1"), (self.offsets, "<i8")):
            digest.update(f"{tensor.numel()}{kind}".encode())
            digest.update(np.ascontiguousarray(tensor.numpy().astype(kind, copy=False)).data)
        return digest.hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Training and validation part; ``fraction`` of the examples, at least one on each side, are held out.

        Both keep the order of the data; which are held out depends on ``seed`` and the number of examples alone.

        Raises
        ------
        DataError
            There are fewer than two examples.
        """
        count = len(self)
        check_can_be_split(count)
        train, validation = split_examples(count, fraction, seed)
        return self.select(torch.from_numpy(train)), self.select(torch.from_numpy(validation))


def _pieces(offsets: torch.Tensor) -> Iterator[range]:
    """Examples that are worked on at once: of so many tokens together, or a single one."""
    count, begin = offsets.numel() - 1, 0
    while begin < count:
        within = int(torch.searchsorted(offsets, offsets[begin] + _PIECE_TOKENS, right=True)) - 1
        end = min(max(within, begin + 1), count)
        yield range(begin, end)
        begin = end


@dataclass(frozen=True)
class Batch:
    """Examples side by side, one per row, padded on the right.

    Attributes
    ----------
    examples:
        int64 [rows]: indices into the data set.
    input_ids:
        int64 [rows, longest].
    lengths:
        int64 [rows]: real tokens of each row.
    targets:
        int64 [rows, longest], already shifted: ``targets[r, t]`` is token t + 1 of the row if that one is to be
        predicted, else -100.
    """

    examples: torch.Tensor
    input_ids: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """bool [rows, longest]: True at real tokens, False at padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.lengths.sum())

    @property
    def answer_tokens(self) -> int:
        """Number of tokens to be predicted."""
        return int((self.targets != IGNORED).sum())


def collate(dataset: TokenizedDataset, indices: Sequence[int] | torch.Tensor, pad_token_id: int) -> Batch:
    """The batch of the examples named (at least one), in that order."""
    examples = torch.as_tensor(indices, dtype=torch.int64)
    chosen = dataset.select(examples)
    lengths = chosen.lengths
    rows, longest = len(chosen), int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]
    tokens = chosen.tokens.to(torch.int64)
    input_ids = torch.full((rows, longest), pad_token_id, dtype=torch.int64)
    input_ids[real] = tokens
    labels = torch.full((rows, longest + 1), IGNORED, dtype=torch.int64)
    labels[:, :-1][real] = torch.where(chosen.is_target, tokens, IGNORED)
    return Batch(examples=examples, input_ids=input_ids, lengths=lengths, targets=labels[:, 1:].contiguous())
