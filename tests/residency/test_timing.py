"""The time model: what must hold whatever the machine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lopt_lite.residency.choices import Residence
from lopt_lite.residency.head_cost import HeadShapes
from lopt_lite.residency.layer_cost import ActivationCost
from lopt_lite.residency.machine import MachineSpeeds
from lopt_lite.residency.shapes import LayerShapes, ModelShapes
from lopt_lite.residency.timing import Amounts, TimeModel

CPU = torch.device("cpu")
LAYERS, PARAMETERS, ADAPTER = 4, 200_000_000, 1_000_000
ACTIVATIONS = ActivationCost(300_000, 0, 0, 80_000, 0, measured=True)

SHAPES = ModelShapes(
    hidden=4096,
    vocabulary=32_000,
    head=HeadShapes(
        rows=32_000, hidden=4096, stored=torch.bfloat16, compute=torch.bfloat16, scaled=False, capped=False
    ),
    itemsize=2,
    quantised=True,
    layers=(LayerShapes(int(0.516 * PARAMETERS), 2 * PARAMETERS, 4096 * 11008, ADAPTER, ACTIVATIONS),) * LAYERS,
    state_bytes_per_parameter=16,
    full=False,
)
SPEEDS = MachineSpeeds(
    bfloat16_flops=1e12,
    float32_flops=3e11,
    elementwise_bytes_per_s=1e11,
    fresh_bytes_per_s=1e10,
    operation_s=1e-6,
    read_bytes_per_s=1e9,
    cached_read_bytes_per_s=1e10,
    write_bytes_per_s=1e9,
    to_device_bytes_per_s=None,
    dequantise_bytes_per_s=1e10,
    quantise_bytes_per_s=1e8,
)
RESIDENT = Residence(
    layers=LAYERS,
    resident_layers=LAYERS,
    dequantised=True,
    recompute=False,
    micro_batch_tokens=2048,
    forward_tokens=4096,
    group_tokens=4096,
    logit_elements=2**22,
    head_slice_rows=None,
    boundary_bytes=0,
    boundary_host_bytes=0,
    offload_state=False,
    cache_keep_bytes=0,
    predicted_bytes=0,
    predicted_host_bytes=0,
)
STREAMED = dataclasses.replace(
    RESIDENT, resident_layers=0, dequantised=False, recompute=True, group_tokens=32_768, boundary_bytes=1 << 40
)
AMOUNTS = Amounts(
    tokens=100_000,
    answer_tokens=50_000,
    held_out_tokens=0,
    held_out_answer_tokens=0,
    padding=1.1,
    steps_per_epoch=50,
    mean_length=250,
    epochs=1,
    head_fit_epochs=1,
)


def model(
    residence: Residence = RESIDENT,
    speeds: MachineSpeeds = SPEEDS,
    *,
    host_free_bytes: int = 0,
    together: bool = False,
) -> TimeModel:
    return TimeModel(
        SHAPES,
        [PARAMETERS] * LAYERS,
        residence,
        speeds,
        dtype=torch.bfloat16,
        device=CPU,
        host_free_bytes=host_free_bytes,
        together=together,
    )


def step_s(residence: Residence, tokens: int = 2048, **kwargs) -> float:
    return model(residence, **kwargs).step_s((0, LAYERS), tokens, 250, train=True)[0]


def test_blocks_that_are_trained_together_share_the_layers_that_stay():
    """A small first block among blocks trained one after the other has all its layers there, as the largest has."""
    half = dataclasses.replace(STREAMED, resident_layers=LAYERS // 2)
    slow_disk = dataclasses.replace(SPEEDS, read_bytes_per_s=1e6)
    alone, together = (model(half, slow_disk, together=together) for together in (False, True))
    first = (0, LAYERS // 4)
    assert alone.step_s(first, 2048, 250, train=True)[1] == 0
    assert together.step_s(first, 2048, 250, train=True)[1] > 0
    whole = (0, LAYERS)
    assert alone.step_s(whole, 2048, 250, train=True) == together.step_s(whole, 2048, 250, train=True)


def test_products_alone_take_two_operations_per_parameter_and_token_each_way():
    endless = dataclasses.replace(
        SPEEDS,
        elementwise_bytes_per_s=1e30,
        fresh_bytes_per_s=1e30,
        float32_flops=1e30,
        operation_s=0.0,
    )
    forward = model(speeds=endless).forward_s(0, 1000, 0)
    assert forward == pytest.approx(2 * (PARAMETERS + ADAPTER) * 1000 / 1e12)
    seconds = model(speeds=endless).step_s((0, LAYERS), 1000, 0.1, train=True)[0]
    assert seconds == pytest.approx(LAYERS * 2 * forward, rel=0.01)


def test_loading_hides_behind_a_quarter_of_flops_over_bytes():
    arithmetic_only = dataclasses.replace(
        SPEEDS,
        bfloat16_flops=5e13,
        elementwise_bytes_per_s=1e30,
        fresh_bytes_per_s=1e30,
        float32_flops=1e30,
        dequantise_bytes_per_s=1e30,
        cached_read_bytes_per_s=5e9,
        read_bytes_per_s=5e9,
    )
    assert model(STREAMED, arithmetic_only).hiding_tokens(0, 0) == pytest.approx(0.25 * 5e13 / 5e9, rel=0.05)


def test_a_step_waits_for_layers_below_the_hiding_tokens_and_not_above():
    times = model(STREAMED)
    tokens = times.hiding_tokens(0, 250)
    assert times.step_s((0, LAYERS), tokens / 4, 250, train=True)[1] > 0
    assert times.step_s((0, LAYERS), tokens * 1.1, 250, train=True)[1] == 0


def test_streaming_costs_more_than_residence_and_large_steps_less_of_it():
    def overhead(tokens: int) -> float:
        return step_s(STREAMED, tokens) / step_s(RESIDENT, tokens)

    assert overhead(512) > overhead(4096) > 1


def test_files_that_the_system_can_cache_load_faster():
    slow_disk = dataclasses.replace(SPEEDS, read_bytes_per_s=1e8)
    uncached = step_s(STREAMED, 64, speeds=slow_disk)
    assert step_s(STREAMED, 64, speeds=slow_disk, host_free_bytes=1 << 40) < uncached / 2


def test_what_is_put_aside_in_a_file_takes_time():
    assert step_s(dataclasses.replace(STREAMED, boundary_bytes=0)) > step_s(STREAMED)
    assert step_s(dataclasses.replace(STREAMED, offload_state=True)) > step_s(STREAMED)


def test_a_run_is_the_sum_of_its_parts():
    times = model().run_times([(0, 2), (2, 4)], ["reconstruct", "task"], AMOUNTS, store_s=3.0)
    assert times.total_s == pytest.approx(3.0 + sum(block.total_s for block in times.blocks))
    early, last = times.blocks
    assert early.head_fit_s > 0 and early.cache_s > 0 and early.train_s > early.head_fit_s
    assert last.head_fit_s == last.cache_s == last.held_out_s == 0 and last.train_s > 0


def test_untrained_blocks_are_only_passed_through():
    early, _ = model().run_times([(0, 2), (2, 4)], ["none", "task"], AMOUNTS, store_s=0).blocks
    assert early.train_s == early.head_fit_s == early.load_s == 0 and early.cache_s > 0


def test_held_out_examples_and_epochs_take_time():
    def total(**changes) -> float:
        amounts = dataclasses.replace(AMOUNTS, **changes)
        return model().run_times([(0, 4)], ["task"], amounts, store_s=0).total_s

    held_out = {"held_out_tokens": 10_000, "held_out_answer_tokens": 5_000}
    assert total(**held_out) > total()
    assert total(epochs=2) > 1.9 * total() - 1


def test_a_block_smaller_than_the_largest_is_no_trouble():
    residence = dataclasses.replace(RESIDENT, layers=3, resident_layers=3)
    times = model(residence).run_times([(0, 3), (3, 4)], ["reconstruct", "task"], AMOUNTS, store_s=0)
    assert times.blocks[1].total_s < times.blocks[0].total_s
