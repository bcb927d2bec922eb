"""Which examples share a batch."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopt_lite.data.batches import epoch_batches, length_sorted_batches, micro_batches
from lopt_lite.data.seeding import permutation

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_has_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = epoch_batches(lengths, batch_size=batch_size, seed=(seed, "epoch", 0))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)


def test_an_epoch_depends_on_its_seed_alone() -> None:
    lengths = torch.randint(1, 500, (300,), generator=torch.Generator().manual_seed(0))
    first = epoch_batches(lengths, batch_size=8, seed=(0, "block", 1, "epoch", 2))
    random.seed(1)
    torch.manual_seed(1)
    assert epoch_batches(lengths.tolist(), batch_size=8, seed=(0, "block", 1, "epoch", 2)) == first
    assert epoch_batches(lengths, batch_size=8, seed=(0, "block", 1, "epoch", 3)) != first


def test_halves_of_batches_hold_similar_lengths_and_batches_mixed_ones() -> None:
    lengths = torch.randint(1, 500, (1024,), generator=torch.Generator().manual_seed(0))
    batches = epoch_batches(lengths, batch_size=8, seed=(0,))
    halves = [half for batch in batches for half in (batch[:4], batch[4:])]
    padded = sum(len(half) * max(int(lengths[i]) for i in half) for half in halves)
    assert padded < 1.1 * int(lengths.sum())
    first, second = (torch.tensor([float(lengths[half].float().mean()) for half in halves[n::2]]) for n in (0, 1))
    for pair in ((first, second), (first + second, torch.arange(len(batches)).float())):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.3


def test_the_order_is_that_of_earlier_versions() -> None:
    """A run that one of them began goes on with its batches."""
    lengths = torch.randint(1, 500, (32,), generator=torch.Generator().manual_seed(0))
    found = epoch_batches(lengths, batch_size=8, seed=(0, "block", 0, "train", 0))
    assert [batch[0] for batch in found] == [28, 14, 18, 7]


def test_a_permutation_never_changes_between_machines_and_versions() -> None:
    assert permutation(12, (0, "block", 0, "epoch", 1)).tolist() == [3, 5, 8, 2, 9, 1, 7, 0, 11, 10, 6, 4]
    assert sorted(permutation(1000, (7,)).tolist()) == list(range(1000))
    assert permutation(0, (0,)).tolist() == []


@given(LENGTHS, st.integers(1, 100), st.integers(1, 5))
def test_forward_batches_are_sorted_and_bounded(lengths: list[int], max_tokens: int, max_rows: int) -> None:
    batches = length_sorted_batches(lengths, max_tokens=max_tokens, max_rows=max_rows)
    order = [i for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: lengths[i])
    for batch in batches:
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


@given(LENGTHS, st.integers(1, 100), st.integers(0, 50))
def test_micro_batches_are_bounded_and_complete(lengths: list[int], max_tokens: int, cost: int) -> None:
    indices = list(range(0, len(lengths), 2))[::-1]
    sizes = torch.tensor(lengths, dtype=torch.int64)
    groups = micro_batches(indices, sizes, max_tokens=max_tokens, cost_tokens=cost)
    assert sorted(i for group in groups for i in group) == sorted(indices)
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens


@pytest.mark.parametrize(("max_tokens", "expected"), [(20, [[2], [0, 3], [1]]), (100, [[2, 0, 3, 1]])])
def test_micro_batches_go_from_long_to_short(max_tokens: int, expected: list[list[int]]) -> None:
    assert micro_batches([0, 1, 2, 3], [10, 7, 15, 9], max_tokens=max_tokens, cost_tokens=20) == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 100), st.integers(0, 50))
def test_no_other_micro_batches_cost_less(lengths: list[int], max_tokens: int, cost: int) -> None:
    def costs(groups: list[list[int]]) -> int:
        return sum(len(group) * lengths[group[0]] + cost for group in groups)

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    possible = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        groups = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(index)
        if all(len(group) == 1 or len(group) * lengths[group[0]] <= max_tokens for group in groups):
            possible.append(costs(groups))
    found = micro_batches(range(len(lengths)), lengths, max_tokens=max_tokens, cost_tokens=cost)
    assert costs(found) == min(possible)


def test_rows_of_unlike_lengths_are_parted_where_padding_costs_more_than_a_group() -> None:
    lengths = [500, 490, 100, 90]
    assert micro_batches(range(4), lengths, max_tokens=4096, cost_tokens=128) == [[0, 1], [2, 3]]
    assert micro_batches(range(4), lengths, max_tokens=4096, cost_tokens=1024) == [[0, 1, 2, 3]]
