"""The defaults that follow from the model and the data."""

from __future__ import annotations

import math

import pytest

from lopt_lite import recipe
from lopt_lite.recipe import ModelKind


@pytest.mark.parametrize(
    ("loss", "weight"),
    [(0.0, 0.3), (1.75, 0.3), (2.0, 0.3), (3.5, 0.95), (5.0, 3.0), (20.0, 3.0), (math.inf, 3.0), (math.nan, 3.0)],
)
def test_the_less_likely_answers_are_the_heavier_is_the_anchor(loss, weight):
    assert recipe.anchor_weight(loss) == weight


@pytest.mark.parametrize(
    ("loss", "steps", "rate"),
    [
        (0.0, 1, 2.6e-3),
        (2.0, 100, 2.6e-3),
        (2.0, 316, 1.8e-3),
        (2.0, 1000, 1.3e-3),
        (2.0, 100_000, 1.3e-3),
        (3.5, 100, 1.4e-3),
        (5.0, 100, 7.8e-4),
        (5.0, 1000, 1.3e-3),
        (math.nan, 10, 7.8e-4),
    ],
)
def test_short_runs_learn_faster_where_answers_are_likely_and_slower_where_they_are_not(loss, steps, rate):
    assert recipe.short_run_rate(1.3e-3, loss, steps) == rate


@pytest.mark.parametrize(
    ("architecture", "width", "rate"),
    [
        ("LlamaForCausalLM", 64, 1.4e-3),
        ("LlamaForCausalLM", 576, 1.3e-3),
        ("LlamaForCausalLM", 4096, 2.9e-4),
        ("Qwen3ForCausalLM", 1024, 5.3e-4),
        ("Qwen2ForCausalLM", 4096, 4.7e-4),
        ("Gemma3ForCausalLM", 640, 4e-4),
        ("MistralForCausalLM", 4096, 2.9e-4),
    ],
)
def test_the_rate_follows_the_width_as_the_kind_of_model_wants_it(architecture, width, rate):
    assert recipe.lora_rate(ModelKind(architecture, width, 4)) == rate


@pytest.mark.parametrize(("layers", "last"), [(1, 1), (2, 1), (3, 2), (4, 3), (18, 13), (30, 22), (32, 24)])
def test_the_last_of_two_blocks_is_the_larger_one(layers, last):
    assert recipe.larger_last_block(layers) == last
