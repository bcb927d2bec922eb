"""Cutting layers into blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_lite.errors import SettingsError
from lopt_lite.training.block_plan import Block, plan_blocks


def test_two_blocks_meet_at_the_midpoint():
    assert plan_blocks(30, ("reconstruct", "task")) == [Block(0, 0, 15, "reconstruct"), Block(1, 15, 30, "task")]


def test_the_first_blocks_get_the_layers_left_over():
    blocks = plan_blocks(11, ("none", "reconstruct", "reconstruct", "task"))
    assert [(b.first, b.end) for b in blocks] == [(0, 3), (3, 6), (6, 9), (9, 11)]


@given(st.data())
def test_every_layer_is_in_exactly_one_block_and_sizes_differ_by_one_at_most(data):
    layers = data.draw(st.integers(1, 200))
    count = data.draw(st.integers(1, layers))
    blocks = plan_blocks(layers, ("none",) * (count - 1) + ("task",))
    assert [i for b in blocks for i in range(b.first, b.end)] == list(range(layers))
    sizes = [b.end - b.first for b in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [b.index for b in blocks] == list(range(count))
    assert blocks[-1].objective == "task"


def test_the_last_block_may_be_larger_or_smaller_than_the_others():
    blocks = plan_blocks(30, ("none", "task"), 22)
    assert [(b.first, b.end) for b in blocks] == [(0, 8), (8, 30)]
    blocks = plan_blocks(30, ("none", "match", "none", "task"), 2)
    assert [(b.first, b.end, b.objective) for b in blocks[:-1]] == [
        (0, 10, "none"),
        (10, 19, "match"),
        (19, 28, "none"),
    ]
    assert (blocks[-1].first, blocks[-1].end) == (28, 30)


@pytest.mark.parametrize("last_layers", [29, 30, 31])
def test_a_last_block_that_leaves_no_layer_for_each_other_block_is_refused(last_layers):
    with pytest.raises(SettingsError, match=f"--last-layers is {last_layers}, and the model has 30 layers") as caught:
        plan_blocks(30, ("none", "none", "task"), last_layers)
    assert caught.value.expected == "at most 28"


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(SettingsError, match="--blocks is 3, and the model has 2 layers") as caught:
        plan_blocks(2, ("none", "none", "task"))
    assert caught.value.expected == "at most 2"
