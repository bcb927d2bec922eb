"""The defaults that follow from the model and the data."""

from __future__ import annotations

import pytest

from lopt_lite import recipe


@pytest.mark.parametrize(
    ("answer_tokens", "weight"),
    [(0, 3.0), (0.5, 3.0), (5, 3.0), (13, 3.0), (20, 2.0), (40, 1.0), (132, 0.3), (150, 0.27), (400, 0.1), (1e6, 0.1)],
)
def test_long_answers_are_anchored_less(answer_tokens, weight):
    assert recipe.anchor_weight(answer_tokens) == weight


@pytest.mark.parametrize(("layers", "last"), [(1, 1), (2, 1), (3, 2), (4, 3), (18, 13), (30, 22), (32, 24)])
def test_the_last_of_two_blocks_is_the_larger_one(layers, last):
    assert recipe.larger_last_block(layers) == last
