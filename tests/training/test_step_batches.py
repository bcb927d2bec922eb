"""How large the micro-batches of a run will be: what is found out before it, and what passes through its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.data.batches import Lengths, epoch_batches
from lopt_lite.residency import choices
from lopt_lite.residency.memory_model import Job, Layout
from lopt_lite.training import step_batches
from lopt_lite.training.block_plan import plan_blocks, plan_stages
from lopt_lite.training.micro_batch_size import MicroBatchSize
from lopt_lite.training.step_batches import LargestMicroBatch, epoch_steps
from tests.rig import CPU
from tests.tiny_models import make_data, make_model

_LAYERS = 4
#: Examples that are not held out.
_TRAINING = 16
_RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "three passes": {"epochs": 3},
    "five steps": {"max_steps": 5},
    "reconstruct": {"objective": "reconstruct", "epochs": 2},
    "joint": {"schedule": "joint", "objective": "reconstruct"},
    "large batches": {"batch_size": 16},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its data, a fifth of which is held out."""
    directory = tmp_path_factory.mktemp("inputs")
    model = make_model(directory / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=_LAYERS)
    return model, make_data(directory / "data.jsonl", 20)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values = {"batch_size": 4, "quantize": "none", "validation": "0.2", **changes}
    return TrainSettings(model=str(model), data=str(data), output=str(output), **values)


def _largest(settings: TrainSettings, lengths: Lengths) -> LargestMicroBatch:
    stages = plan_stages(plan_blocks(_LAYERS, settings.objectives()), settings.schedule)
    return LargestMicroBatch(settings, stages, lengths, CPU)


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        ("default", 64),
        ("default", 2048),
        ("three passes", 150),
        ("five steps", 64),
        ("reconstruct", 150),
        ("joint", 150),
        ("large batches", 2048),
    ],
)
def test_it_is_the_largest_of_the_run(recipe, most, inputs, tmp_path, monkeypatch):
    """With little room, with some, and with as much as any step needs."""
    sizes, rows, pairs, lengths = [], [], [], []
    split = MicroBatchSize.split

    def recorded(self: MicroBatchSize, *arguments: Any) -> list[list[int]]:
        parts = split(self, *arguments)
        lengths[:] = self._lengths.tolist()
        sizes.extend(len(part) * max(lengths[i] for i in part) for part in parts)
        rows.extend(map(len, parts))
        pairs.append(sum(len(part) * max(lengths[i] for i in part) ** 2 for part in parts))
        return parts

    monkeypatch.setattr(MicroBatchSize, "split", recorded)
    monkeypatch.setattr(MicroBatchSize, "tokens", lambda *arguments: most)
    settings = _settings(inputs, tmp_path / "run", **_RECIPES[recipe])
    lopt_lite.train(settings)
    found = _largest(settings, lengths[:_TRAINING])
    assert found.is_quick
    assert found(most) == (max(sizes), max(rows), max(pairs))


def test_steps_are_the_first_ones_of_each_pass():
    lengths = list(range(10, 31))

    def steps(epoch: int, steps: int) -> list[list[int]]:
        return epoch_steps(lengths, batch_size=4, seed=5, stage=1, phase="train", epoch=epoch, steps=steps)

    whole = [epoch_batches(lengths, batch_size=4, seed=(5, "block", 1, "train", epoch)) for epoch in range(2)]
    assert [steps(0, 12), steps(1, 12), steps(2, 12)] == [*whole, []]
    assert [steps(0, 8), steps(1, 8)] == [whole[0], whole[1][:2]]
    assert [steps(0, 6), steps(1, 6)] == [whole[0], []]


def test_blocks_that_learn_nothing_have_no_steps():
    settings = TrainSettings(model="model", data="data", blocks=2, objective="none", batch_size=2, epochs=20)
    lengths = [10, 20, 30, 40]
    (of_last,) = {stage for stage, _, _ in _largest(settings, lengths)._phases}
    assert of_last == 1


def test_many_examples_are_not_gone_through():
    def is_quick(batch_size: int, examples: int, length: int) -> bool:
        settings = TrainSettings(model="model", data="data", epochs=2, batch_size=batch_size)
        return _largest(settings, [length] * examples).is_quick

    assert is_quick(8, 24_000, 200) and not is_quick(8, 26_000, 200)
    # Of large batches of short examples, many could pass together.
    assert is_quick(1000, 15_000, 200) and not is_quick(1000, 15_000, 10)
    assert is_quick(10**6, 400, 10) and not is_quick(10**6, 2000, 10)


def test_the_same_is_found_out_once():
    settings = TrainSettings(model="model", data="data", batch_size=2)
    before = step_batches._largest.cache_info().misses
    lengths = torch.tensor([3001, 7, 30, 3002])
    found = [_largest(settings, lengths)(2048) for _ in range(2)]
    assert found[0] == found[1] and found[0][0] == 3002
    assert step_batches._largest.cache_info().misses == before + 1


def test_on_a_gpu_more_padding_is_worth_another_micro_batch():
    settings = TrainSettings(model="model", data="data", batch_size=2)
    stages = plan_stages(plan_blocks(_LAYERS, settings.objectives()), settings.schedule)
    of_kind = {
        kind: LargestMicroBatch(settings, stages, [300, 100], torch.device(kind))(2048) for kind in ("cpu", "cuda")
    }
    assert of_kind == {"cpu": (300, 1, 300**2 + 100**2), "cuda": (600, 2, 2 * 300**2)}


def test_the_most_examples_need_not_be_those_with_the_most_tokens():
    """State spaces fill up each of many short rows."""
    settings = TrainSettings(model="model", data="data", batch_size=32)
    assert _largest(settings, [1100] * 3 + [10] * 29)(2048)[1] == 29


def test_a_run_is_planned_for_it_and_so_is_the_same_run_on_paper(inputs, tmp_path, monkeypatch):
    seen: set[tuple[int, int]] = set()
    peak = choices.training_peak

    def recorded(shapes: Any, block: Any, job: Job, layout: Layout, *arguments: Any, **options: Any) -> int:
        seen.add((layout.micro_batch_tokens, layout.micro_tokens(job)))
        return peak(shapes, block, job, layout, *arguments, **options)

    monkeypatch.setattr(choices, "training_peak", recorded)
    # One long example, which goes alone.
    data = tmp_path / "data.jsonl"
    line = json.dumps({"question": "w1 w2", "answer": " ".join(["w3"] * 300)})
    data.write_text(inputs[1].read_text() + line + "\n")
    settings = _settings((inputs[0], data), tmp_path / "run", validation=None)
    lopt_lite.train(settings)
    of_run = set(seen)
    seen.clear()
    planned = lopt_lite.plan(settings)
    assert of_run <= seen
    assert {tokens for _, tokens in of_run} == {planned.longest_tokens}
