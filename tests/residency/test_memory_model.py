"""Bounds that the plan relies on, against batches as runs make them."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from lopt_lite.data.batches import length_sorted_batches, micro_batches, shortest
from lopt_lite.data.estimate import DataEstimate
from lopt_lite.residency.mask_cost import MaskCost
from lopt_lite.residency.memory_model import FORWARD_ROWS, Job, Layout, forward_peak
from lopt_lite.settings import TrainSettings
from tests.rig import shapes_on_paper


def _lengths(kind: str, count: int) -> list[int]:
    drawn = random.Random(f"{kind} {count}")
    if kind == "short and long":
        return [drawn.choice((9, 480)) for _ in range(count)]
    if kind == "alike":
        return [100] * count
    return [min(2000, 1 + int(drawn.expovariate(1 / 150))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["short and long", "alike", "spread"])
@pytest.mark.parametrize("count", [1, 40, 400])
@pytest.mark.parametrize("max_tokens", [1, 128, 1024, 4096])
def test_no_batch_has_more_examples_than_the_plan_says(kind, count, max_tokens):
    lengths = _lengths(kind, count)
    job = Job(step_tokens=1, longest=max(lengths), rows=8, shortest=shortest(lengths, FORWARD_ROWS))
    drawn = random.Random(0)
    for _ in range(10):
        some = drawn.sample(range(count), drawn.randint(1, count))
        of_some = [lengths[i] for i in some]
        passing = length_sorted_batches(of_some, max_tokens=max_tokens, max_rows=FORWARD_ROWS)
        assert max(map(len, passing)) <= job.rows_among(max_tokens, FORWARD_ROWS)
        step = micro_batches(some[:8], lengths, max_tokens=max_tokens, cost_tokens=64)
        assert max(map(len, step)) <= job.rows_among(max_tokens, job.rows)
    if kind != "spread":
        # And it is not far from what there is.
        everything = length_sorted_batches(lengths, max_tokens=max_tokens, max_rows=FORWARD_ROWS)
        assert job.rows_among(max_tokens, FORWARD_ROWS) == max(map(len, everything))


def test_where_lengths_are_unknown_any_may_be_one_token():
    job = Job(step_tokens=1, longest=100)
    assert (job.rows_among(8, 64), job.rows_among(1000, 64)) == (8, 64)


def test_a_sample_stands_for_all_examples():
    lengths = tuple(range(10, 110))
    counted = DataEstimate(100, sum(lengths), 1, 109, lengths, "counted")
    assert counted.shortest(3) == (10, 11, 12)
    assert counted.shortest(1000) == lengths
    sampled = dataclasses.replace(counted, examples=1000, how="sampled")
    # Ten examples stand behind each of the sample's.
    assert sampled.shortest(12) == (10,) * 10 + (11,) * 2
    assert len(sampled.shortest(2000)) == 1000


@pytest.mark.parametrize("itemsize", [2, 4])
def test_prompts_that_are_padded_have_masks_of_all_pairs(itemsize, tmp_path):
    settings = TrainSettings(model="model", data="data", quantize="none")
    shapes = dataclasses.replace(shapes_on_paper(tmp_path, settings, 128, hidden_size=64), itemsize=itemsize)
    layout = Layout(4, False, False, 500, 2**20, None, False)

    def peak(rows: int, *, generates: bool, window: int | None = None) -> int:
        job = Job(step_tokens=0, longest=300, forward_rows=rows, measured_tokens=rows, generates=generates)
        windowed = dataclasses.replace(shapes, masks=MaskCost(window))
        return forward_peak(windowed, (0, 4), job, layout, 1000, on_cpu=True)

    of_pairs = (1 + itemsize) * 1000 * 300
    assert peak(4, generates=True) - peak(4, generates=False) == of_pairs
    # A single prompt is not padded: it has a mask where it is longer than a window.
    assert peak(1, generates=True) == peak(1, generates=False)
    assert peak(1, generates=True, window=298) - peak(1, generates=False, window=298) == of_pairs
    assert peak(1, generates=True, window=300) == peak(1, generates=False, window=300)


def test_the_shortest_are_found_in_any_order():
    assert shortest(torch.tensor([5, 3, 9, 3]), 3) == (3, 3, 5)
    assert shortest([4, 2], 10) == (2, 4)
