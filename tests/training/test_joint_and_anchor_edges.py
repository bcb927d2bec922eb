"""Corners of the joint schedule and of the anchor: rows without a loss, runs gone on with, what is left in memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.data.dataset import collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import StoppedError
from lopt_lite.events import Event, Step, Validation, ignore
from lopt_lite.residency.choices import Memory, choose_residence, smallest_budget
from lopt_lite.training import block_trainer, memory_choice, stopping
from lopt_lite.training.block_plan import plan_blocks
from lopt_lite.training.job import make_job
from tests.rig import CPU, residence, shapes_on_paper
from tests.tiny_models import make_data, make_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    model = make_model(directory / "model", "llama-tied", dtype=torch.bfloat16)
    return model, make_data(directory / "data.jsonl", 12)


def _settings(inputs: tuple[Path, Path], run: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values = {"batch_size": 4, "dtype": "float32", "quantize": "none", **changes}
    return TrainSettings(model=str(model), data=str(data), output=str(run), **values)


def _use(monkeypatch: pytest.MonkeyPatch, mode: str, **changes: Any) -> None:
    chosen = residence(mode, layers=4, **changes)
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["streamed", "offloaded"])
def test_an_early_block_may_have_nothing_to_learn_from_a_micro_batch(tmp_path, inputs, mode, monkeypatch):
    """Other text has no answers, so that an early block with the task gets no gradient from a micro-batch of it."""
    other = make_data(tmp_path / "other.jsonl", 5, seed=4)
    changes = {"schedule": "joint", "objective": "task", "retain": 1.0, "retain_data": str(other)}
    adapters = []
    for chosen in ("resident", mode):
        _use(monkeypatch, chosen, micro_batch_tokens=32, dequantised=False)
        run = tmp_path / chosen
        lopt_lite.train(_settings(inputs, run, **changes))
        adapters.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_the_final_loss_is_the_tasks_alone(tmp_path, inputs):
    outcome = lopt_lite.train(_settings(inputs, tmp_path / "run", schedule="joint"))
    losses = [record["loss"] for record in _metrics(tmp_path / "run") if record["phase"] == "train"]
    assert outcome.final_train_loss == pytest.approx(sum(losses) / len(losses))


def test_nothing_of_a_trained_block_waits_for_the_garbage_collector(tmp_path, inputs, monkeypatch):
    """Without --memory nobody collects garbage between blocks, and the next block's layers need the room."""
    trainers: list[weakref.ref[block_trainer.BlockTrainer]] = []
    alive: list[int] = []
    start = block_trainer.BlockTrainer.__init__

    def started(self: block_trainer.BlockTrainer, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(trainer() is not None for trainer in trainers))
        start(self, *args, **kwargs)
        trainers.append(weakref.ref(self))

    monkeypatch.setattr(block_trainer.BlockTrainer, "__init__", started)
    gc.collect()
    gc.disable()
    try:
        lopt_lite.train(_settings(inputs, tmp_path / "run", blocks=4, tune="full", objective="reconstruct"))
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("changes", [{"preset": "paper"}, {"schedule": "joint"}], ids=["paper", "lora"])
def test_a_head_that_is_trained_is_not_read_in_slices(tmp_path, changes):
    """On paper: a vocabulary that is large beside the layers, and every budget from the smallest on."""
    settings = TrainSettings(model="model", data="data", **changes)
    shapes = shapes_on_paper(tmp_path, settings, 128256, hidden_size=1024, intermediate_size=4096)
    blocks = plan_blocks(4, settings.objectives())
    job = make_job(
        settings,
        shapes,
        blocks,
        train_examples=1000,
        all_examples=1000,
        other_examples=0,
        longest=512,
        all_tokens=300_000,
        shortest=lambda most: (150,) * most,
        most_answers=300,
        held_out_answers=0,
        most_anchors=0,
    )
    memory = Memory(budget_bytes=0, used_bytes=2**29, free_bytes=2**36, free_host_bytes=2**36)
    smallest = smallest_budget(shapes, [(0, 4)], job, device=CPU, memory=memory)
    slices = set()
    for budget_bytes in range(smallest, smallest + 2**30, 2**24):
        enough = Memory(budget_bytes, memory.used_bytes, memory.free_bytes, memory.free_host_bytes)
        slices.add(choose_residence(shapes, [(0, 4)], job, device=CPU, memory=enough).head_slice_rows)
    assert (slices == {None}) == settings.trains_around


_STOPS = [("head-fit", 2), ("head-fit", 3), ("train", 1), ("held-out", 1), ("train", 4), ("train", 6)]


@pytest.mark.parametrize("mode", ["resident", "offloaded"])
@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper", "head_fit_epochs": 1, "lr": 1e-3, "dtype": "bfloat16"},
        {"preset": "paper", "head_fit_epochs": 1, "lr": 1e-3, "objective": "none,reconstruct"},
        {"schedule": "joint", "objective": "task,reconstruct", "retain": 1.0, "lora_dropout": 0.1},
    ],
    ids=["bfloat16", "first block frozen", "anchored"],
)
def test_a_joint_run_stopped_in_every_phase_ends_with_the_same_bytes(tmp_path, inputs, changes, mode, monkeypatch):
    _use(monkeypatch, mode, micro_batch_tokens=96)
    values = {"blocks": 3, "epochs": 2, "validation": "0.2", "checkpoint_every": "0s", "batch_size": 4, **changes}
    results = []
    for name, stops in (("whole", []), ("cut", _STOPS)):
        settings = _settings(inputs, tmp_path / name, **values)
        for place in stops:

            def stop_there(event: Event, place: tuple[str, int] = place) -> None:
                here = isinstance(event, Step) and (event.phase, event.step) == place
                if here or (isinstance(event, Validation) and ("held-out", event.epoch) == place):
                    raise stopping.stopped("the test")

            with pytest.raises(StoppedError):
                lopt_lite.train(settings, stop_there)
        lopt_lite.train(settings)
        result = tmp_path / name / ("model" if settings.tune == "full" else "adapter")
        steps = [(r["phase"], r["step"], r["loss"], r["grad_norm"]) for r in _metrics(tmp_path / name)]
        results.append(({p.name: p.read_bytes() for p in result.glob("*.safetensors")}, steps))
    assert results[0] == results[1]


@pytest.mark.parametrize("architecture", ["phi", "gpt2", "gemma2", "cohere"])
def test_what_is_trained_around_the_layers_is_in_the_result(tmp_path, architecture):
    """Heads with a bias, soft-capped and scaled logits, norms with a bias, scaled embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(tmp_path / "model", architecture)
    data, held_out = make_data(tmp_path / "data.jsonl", 8), make_data(tmp_path / "held-out.jsonl", 5, seed=9)
    run = tmp_path / "run"
    settings = _settings((model, data), run, preset="paper", epochs=2, lr=1e-3, validation=str(held_out))
    outcome = lopt_lite.train(settings)
    tuned = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    dataset, _ = load_dataset(
        held_out, AutoTokenizer.from_pretrained(model), max_length=1024, skip_bad_lines=False, on_event=ignore
    )
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in range(len(dataset)):
            batch = collate(dataset, [example], 0)
            logits = tuned(batch.input_ids).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, batch.targets[0], reduction="sum"))
            tokens += batch.answer_tokens
    assert outcome.loss_after == pytest.approx(total / tokens, rel=1e-5)
    assert outcome.loss_after < outcome.loss_before


@pytest.mark.parametrize(
    ("changes", "examples", "most_answers", "held_out", "measured"),
    [
        ({}, 1000, 300, 0, 32 * 300),
        ({}, 5, 300, 0, 5 * 300),
        ({}, 1000, 300, 64 * 400, 64 * 400),
        ({}, 1000, None, 0, None),
        ({"lr": 1e-3}, 1000, 300, 0, 32 * 300),
        ({"lr": 1e-3, "retain": 0.0}, 1000, 300, 0, 0),
        ({"lr": 1e-3, "retain": 0.0}, 1000, None, 0, 0),
        ({"lr": 1e-3, "retain": 0.0}, 1000, None, None, None),
        ({"retain": 1.0}, 1000, 300, 0, 32 * 300),
        ({"retain": 1.0}, 8000, 300, 0, 0),
        ({"schedule": "joint"}, 1000, 300, 0, 0),
        ({"preset": "paper"}, 1000, 300, 640, 640),
    ],
    ids=str,
)
def test_the_pass_that_measures_answers_is_in_the_plan(tmp_path, changes, examples, most_answers, held_out, measured):
    settings = TrainSettings(model="model", data="data", **changes)
    job = make_job(
        settings,
        shapes_on_paper(tmp_path, settings, 128, hidden_size=64),
        plan_blocks(4, settings.objectives()),
        train_examples=examples,
        all_examples=examples,
        other_examples=0,
        longest=512,
        all_tokens=300_000,
        shortest=lambda most: (150,) * most,
        most_answers=most_answers,
        held_out_answers=held_out,
        most_anchors=0,
    )
    assert job.measured_tokens == measured
