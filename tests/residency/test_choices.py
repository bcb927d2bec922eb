"""How much goes through the device at once where memory is plenty, and where it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lopt_lite import TrainSettings
from lopt_lite.errors import DoesNotFitError, RunDirectoryError
from lopt_lite.residency import choices
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.memory_model import Job, Layout, forward_peak
from lopt_lite.residency.spill import SpillLimits
from lopt_lite.training.block_plan import plan_blocks
from lopt_lite.training.job import make_job
from tests.rig import CPU, shapes_on_paper

MIB = 2**20
PLENTY = 2**36


def _residence(
    directory: Path, vocabulary: int, *, tight: bool, device: torch.device = CPU, **changes: int
) -> tuple[Residence, Memory]:
    """Where the last two layers of four are, with memory that is plenty or the smallest that works, but for changes."""
    settings = TrainSettings(model="model", data="data")
    shapes = shapes_on_paper(directory, settings, vocabulary, hidden_size=256)
    job = make_job(
        settings,
        shapes,
        plan_blocks(4, settings.objectives()),
        train_examples=1000,
        all_examples=1000,
        other_examples=0,
        longest=512,
        all_tokens=300_000,
        shortest=lambda most: (150,) * most,
        most_answers=300,
        held_out_answers=0,
        most_anchors=32,
    )
    memory = Memory(budget_bytes=PLENTY, used_bytes=512 * MIB, free_bytes=PLENTY, free_host_bytes=PLENTY)
    if tight:
        smallest = smallest_budget(shapes, [(2, 4)], job, device=device, memory=memory)
        memory = dataclasses.replace(memory, budget_bytes=smallest)
    memory = dataclasses.replace(memory, **changes)
    return choose_residence(shapes, [(2, 4)], job, device=device, memory=memory), memory


def _logit_elements(directory: Path, vocabulary: int, *, tight: bool) -> int:
    return _residence(directory, vocabulary, tight=tight)[0].logit_elements


@pytest.mark.parametrize(("vocabulary", "elements"), [(512, 2**24), (49_152, 2**24), (262_144, 2**26)])
def test_chunks_of_logits_have_many_tokens_however_large_the_vocabulary_is(tmp_path, vocabulary, elements):
    assert _logit_elements(tmp_path, vocabulary, tight=False) == elements


def test_where_memory_is_tight_chunks_of_logits_are_small(tmp_path):
    assert _logit_elements(tmp_path, 262_144, tight=True) <= 2**22


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_gpu_keeps_some_of_its_budget_for_the_holes_that_its_allocator_leaves(tmp_path, kind):
    for tight in (True, False):
        found, memory = _residence(tmp_path, 32_000, tight=tight, device=torch.device(kind))
        assert found.predicted_bytes <= 0.92 * memory.budget_bytes


def test_what_an_apple_gpu_has_no_room_for_is_not_put_in_the_hosts_memory(tmp_path):
    found = {kind: _residence(tmp_path, 32_000, tight=True, device=torch.device(kind))[0] for kind in ("cuda", "mps")}
    assert found["cuda"].cache_keep_bytes > 0
    assert (found["mps"].cache_keep_bytes, found["mps"].boundary_host_bytes) == (0, 0)


def test_what_a_gpu_puts_aside_takes_a_share_of_the_hosts_memory(tmp_path):
    settings = TrainSettings(model="model", data="data", tune="full")
    shapes = shapes_on_paper(tmp_path, settings, 512, hidden_size=1024, intermediate_size=4096)
    job, ranges = Job(step_tokens=32 * 512, longest=512, rows=32, cache_bytes=40 * MIB, early_blocks=True), [(0, 4)]
    device = torch.device("cuda")

    def residence(free: int) -> Residence:
        memory = Memory(budget_bytes=0, used_bytes=0, free_bytes=PLENTY, free_host_bytes=free)
        smallest = smallest_budget(shapes, ranges, job, device=device, memory=memory)
        return choose_residence(shapes, ranges, job, device=device, memory=memory.with_budget(smallest))

    plenty, libraries = residence(PLENTY), choices._LIBRARIES_BYTES + 2 * shapes.largest_shard
    assert plenty.offload_state and plenty.boundary_host_bytes > 0
    assert plenty.state_host_bytes == int(shapes.state_bytes_per_parameter * shapes.trained_parameters(0, 4))
    put_aside = plenty.state_host_bytes + plenty.boundary_host_bytes
    assert plenty.predicted_host_bytes == libraries + put_aside + job.cache_bytes
    for free in (0, 100 * MIB, int(plenty.state_host_bytes / 0.6) + 4 * MIB, PLENTY):
        found = residence(free)
        taken = found.state_host_bytes + found.boundary_host_bytes
        assert taken == min(put_aside, int(0.6 * free))
        # Most of the state is read and written in every step.
        assert found.boundary_host_bytes == 0 or found.state_host_bytes == plenty.state_host_bytes
        # A block's inputs, its targets and the anchor's cache may each be kept.
        assert taken + 3 * found.cache_keep_bytes <= 0.6 * free
        kept = job.cache_bytes if found.cache_keep_bytes >= job.cache_bytes else 0
        assert found.predicted_host_bytes == libraries + taken + kept
        assert found.state_limits == SpillLimits(0, found.state_host_bytes)


def test_a_run_of_an_earlier_version_goes_on_as_it_began(tmp_path):
    found, _ = _residence(tmp_path, 512, tight=True, device=torch.device("cuda"))
    values = found.to_json()
    assert Residence.from_json(values) == found
    del values["state_host_bytes"]
    assert Residence.from_json(values) == dataclasses.replace(found, state_host_bytes=1 << 62)
    on_cpu, _ = _residence(tmp_path, 512, tight=True)
    of_cpu = on_cpu.to_json()
    del of_cpu["state_host_bytes"]
    assert Residence.from_json(of_cpu) == on_cpu
    del values["boundary_bytes"]
    with pytest.raises(RunDirectoryError, match="does not say boundary_bytes"):
        Residence.from_json(values)


def test_a_budget_that_is_not_to_be_had_is_no_reason_to_raise_it(tmp_path):
    for named, says, fix in ((PLENTY, "MiB named, no more is free", "end what else"), (100 * MIB, "MiB is", "raise")):
        with pytest.raises(DoesNotFitError) as refused:
            _residence(tmp_path, 512, tight=False, budget_bytes=100 * MIB, named_bytes=named)
        assert says in refused.value.found
        assert refused.value.fix.startswith(fix)


@pytest.mark.parametrize("budget_mib", [None, 1024])
def test_every_block_fits_also_one_of_fewer_layers_that_keep_more(tmp_path, budget_mib):
    settings = TrainSettings(model="model", data="data")
    shapes = shapes_on_paper(tmp_path, settings, 512, hidden_size=256)
    heavy, *light = shapes.layers
    kept = dataclasses.replace(heavy.activations, saved_bytes_per_token=60_000)
    shapes = dataclasses.replace(shapes, layers=(dataclasses.replace(heavy, activations=kept), *light))
    job = Job(step_tokens=4096, longest=512, rows=8)
    memory = Memory(
        budget_bytes=None if budget_mib is None else budget_mib * MIB,
        used_bytes=512 * MIB,
        free_bytes=PLENTY,
        free_host_bytes=PLENTY,
    )

    def predicted(*ranges: tuple[int, int]) -> int:
        return choose_residence(shapes, ranges, job, device=CPU, memory=memory).predicted_bytes

    both = predicted((0, 1), (1, 4))
    assert both >= predicted((0, 1)) > predicted((1, 4))
    least = [smallest_budget(shapes, r, job, device=CPU, memory=memory) for r in ([(0, 1), (1, 4)], [(0, 1)], [(1, 4)])]
    assert least[0] == max(least)


@pytest.mark.parametrize("changes", [{}, {"tune": "full"}], ids=["lora", "full"])
def test_where_losses_are_measured_between_steps_the_optimisers_state_counts(tmp_path, changes):
    """As with held-out examples that are much longer than those that are learnt."""
    settings = TrainSettings(model="model", data="data", **changes)
    shapes = shapes_on_paper(tmp_path, settings, 512, hidden_size=256)
    layout = Layout(2, False, False, 512, 2**20, None, False)

    def peak(*, held_out: bool) -> int:
        job = Job(step_tokens=64, longest=512, rows=8, held_out=held_out)
        return forward_peak(shapes, (2, 4), job, layout, 512, on_cpu=True)

    more = peak(held_out=True) - peak(held_out=False)
    item = shapes.itemsize if shapes.full else 4
    # Values were counted before, and gradients are gone by then.
    moments = shapes.state_bytes_per_parameter - 2 * item
    assert more == int(moments * shapes.trained_parameters(2, 4))


def test_outside_training_steps_adapters_are_not_fused(tmp_path):
    settings = TrainSettings(model="model", data="data")
    tuned = shapes_on_paper(tmp_path, settings, 512, hidden_size=256, intermediate_size=1024)
    assert {layer.adapting_bytes_per_token for layer in tuned.layers} == {2 * 1024 * tuned.itemsize}
    untuned = dataclasses.replace(
        tuned, layers=tuple(dataclasses.replace(layer, adapting_bytes_per_token=0) for layer in tuned.layers)
    )
    job, layout = Job(step_tokens=0, longest=64), Layout(2, False, False, 512, 2**20, None, False)
    with_adapters, without = (
        forward_peak(shapes, (2, 4), job, layout, 1024, on_cpu=True) for shapes in (tuned, untuned)
    )
    assert with_adapters - without == 1024 * 2 * 1024 * tuned.itemsize
