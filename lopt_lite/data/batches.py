"""Which examples share a batch: plain lists of indices, decided from lengths and a seed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

import torch

from lopt_lite.data.seeding import SeedParts, permutation

#: Examples are sorted by length within this many batches: little padding, and still nearly random neighbours.
BUCKET_BATCHES = 32

Lengths: TypeAlias = torch.Tensor | Sequence[int]


def epoch_batches(lengths: Lengths, *, batch_size: int, seed: SeedParts) -> list[list[int]]:
    """One epoch in a shuffled order, every example exactly once. A batch is two halves, each of similar lengths.

    That is so for even sizes, until the one half of a bucket that may be short: from there on, and of odd sizes, a
    batch has parts of up to three halves. (The order is part of what a resumed run relies on.)

    So there is little padding, as the halves need not pass through the model together, and yet most batches have long
    and short examples: with a single length in each, training end to end ended with a higher loss (docs/recipe.md).

    Parameters
    ----------
    lengths:
        Tokens of every example: int64 [examples].
    batch_size:
        Examples per batch; the last batch of the epoch may have fewer.
    seed:
        Numbers and words that name the epoch, e.g. ``(seed, "block", 0, "epoch", 1)``.
    """
    sizes = as_list(lengths)
    shuffled = permutation(len(sizes), (*seed, "examples")).tolist()
    half_size, bucket_size = -(-batch_size // 2), batch_size * BUCKET_BATCHES
    halves: list[list[int]] = []
    for begin in range(0, len(shuffled), bucket_size):
        bucket = sorted(shuffled[begin : begin + bucket_size], key=sizes.__getitem__)
        halves.extend(bucket[i : i + half_size] for i in range(0, len(bucket), half_size))
    order = [i for half in permutation(len(halves), (*seed, "halves")).tolist() for i in halves[half]]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def length_sorted_batches(lengths: Lengths, *, max_tokens: int, max_rows: int) -> list[list[int]]:
    """All examples from short to long, for passes without training: rows times longest stays within ``max_tokens``.

    An example longer than ``max_tokens`` is a batch of its own.
    """
    sizes = as_list(lengths)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    batches: list[list[int]] = []
    for index in order:
        # Sorted ascending: the newcomer is the longest of the batch.
        current = batches[-1] if batches else []
        if current and len(current) < max_rows and (len(current) + 1) * sizes[index] <= max_tokens:
            current.append(index)
        else:
            batches.append([index])
    return batches


def micro_batches(indices: Sequence[int], lengths: Lengths, *, max_tokens: int, cost_tokens: int) -> list[list[int]]:
    """Split one step's examples into groups from long to short, each with rows times longest within ``max_tokens``.

    Of all such groups of neighbours in length, those for which the padded tokens of all groups, and ``cost_tokens`` for
    each of them, are fewest.

    Parameters
    ----------
    indices:
        The step's examples.
    lengths:
        Tokens of every example of the *data set*: int64 [examples]; ``lengths[i]`` for i in ``indices`` is read.
    max_tokens:
        Bound on rows times longest; an example longer than it is a group of its own.
    cost_tokens:
        What a group costs beside its tokens, in the time of so many tokens.
    """
    sizes = {i: int(lengths[i]) for i in indices}
    order = sorted(indices, key=lambda i: -sizes[i])
    # The cheapest way to group the first n examples, for every n, and where the last of its groups begins.
    cost, begins = [0] + [-1] * len(order), [0] * (len(order) + 1)
    for begin, longest in enumerate(sizes[i] for i in order):
        for end in range(begin + 1, len(order) + 1):
            tokens = (end - begin) * longest
            if tokens > max_tokens and end > begin + 1:
                break
            total = cost[begin] + tokens + cost_tokens
            if cost[end] < 0 or total < cost[end]:
                cost[end], begins[end] = total, begin
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def shortest(lengths: Lengths, most: int) -> tuple[int, ...]:
    """The shortest of ``lengths``, ``most`` at most, from short to long."""
    return tuple(heapq.nsmallest(most, as_list(lengths)))


def as_list(lengths: Lengths) -> list[int]:
    """The same as Python's numbers, which are much faster to look at one by one."""
    return [int(n) for n in (lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)]
