"""However often a run is asked to stop, it stops there and ends with the bytes of a run that was not."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import TrainSettings, devices
from lopt_lite.data import load
from lopt_lite.errors import RunDirectoryError, StoppedError
from lopt_lite.events import BlockDone, BlockStarted, Event, Progress, Step, Validation
from lopt_lite.journal import read_facts
from lopt_lite.results.run_record import read_run
from lopt_lite.training import block_trainer, memory_choice, stopping
from lopt_lite.training.metrics import read_metrics
from tests.rig import residence
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model
from tests.training.same_runs import assert_same
from tests.training.same_runs import steps as steps_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its data."""
    directory = tmp_path_factory.mktemp("inputs")
    model = make_model(directory / "model", "llama", dtype=torch.bfloat16)
    return model, make_data(directory / "data.jsonl", 24)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values = {
        "blocks": 3,
        "epochs": 2,
        "batch_size": 4,
        "validation": "0.2",
        "lora_dropout": 0.1,
        "quantize": "none",
        "dtype": "float32",
        **EVERY_BLOCK_LEARNS,
        **changes,
    }
    return TrainSettings(model=str(model), data=str(data), output=str(output), **values)


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layers are, and several micro-batches a step."""
    chosen = residence(getattr(request, "param", "resident"), micro_batch_tokens=80)
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)


@pytest.fixture
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options other than the usual ones."""
    return getattr(request, "param", {})


@pytest.fixture
def reference(inputs, tmp_path, one_thread, mode, changes) -> Path:
    """A run that nobody disturbs."""
    lopt_lite.train(_settings(inputs, tmp_path / "reference", **changes))
    return tmp_path / "reference"


def _ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


_FULL_8_BIT = {"tune": "full", "dtype": "bfloat16", "lora_dropout": 0.0, "lr": 1e-3}
_FULL_FLOAT = {"tune": "full", "dtype": "float32", "lora_dropout": 0.0, "lr": 1e-3}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("resident", {}),
        ("resident", {"max_steps": 7, "blocks": 1}),
        ("offloaded", {}),
        ("partly streamed", _FULL_FLOAT),
    ],
    indirect=True,
)
def test_stopped_at_every_step_it_ends_with_the_same_bytes(inputs, tmp_path, reference, changes):
    """One step an attempt: also at the last step of a phase, of an epoch, of a block."""
    settings = _settings(inputs, tmp_path / "run", **changes)
    steps, stops = [], 0

    def stop_at_each_step(event: Event) -> None:
        if isinstance(event, Step):
            steps.append((event.block, event.phase, event.step))
            _ctrl_c()

    for _ in range(60):
        try:
            outcome = lopt_lite.train(settings, on_event=stop_at_each_step)
        except StoppedError as error:
            assert error.exit_code == 75
            assert "stopped by SIGINT" in error.found
            stops += 1
        else:
            break
    assert stops == len(steps) == len(steps_of(reference)), "no step may be done twice"
    assert_same(tmp_path / "run", reference)
    whole = lopt_lite.train(_settings(inputs, reference, **changes))
    assert (outcome.loss_before, outcome.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.parametrize("kind", [Progress, BlockStarted, BlockDone, Validation])
def test_stopped_between_the_steps_it_ends_with_the_same_bytes(inputs, tmp_path, reference, kind):
    """While weights are prepared, outputs cached, losses measured."""
    settings = _settings(inputs, tmp_path / "run")
    seen: set[str] = set()

    stops = 0
    for _ in range(60):
        asked = []

        def stop_once(event: Event, asked: list[Event] = asked) -> None:
            place = str({**event.to_json(), "step": None, "loss": None})
            if isinstance(event, kind) and place not in seen and not asked:
                seen.add(place)
                asked.append(event)
                _ctrl_c()

        try:
            lopt_lite.train(settings, on_event=stop_once)
        except StoppedError:
            stops += 1
        else:
            break
    assert stops >= 2
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("which", ["data", "validation", "retain_data"])
def test_stopped_while_data_are_read_it_stops_there_and_nothing_is_written(inputs, tmp_path, monkeypatch, which):
    monkeypatch.setattr(load, "_CHUNK_EXAMPLES", 2)
    options: dict[str, Any] = {which: str(make_data(tmp_path / "long.jsonl", 40))}
    if which == "retain_data":
        options["retain"] = 1.0
    events: list[Event] = []

    def stop_at_the_first_part(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "Reading long.jsonl":
            events.append(event)
            _ctrl_c()

    settings = dataclasses.replace(_settings(inputs, tmp_path / "run"), **options)
    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        lopt_lite.train(settings, on_event=stop_at_the_first_part)
    assert len(events) == 1
    assert not (tmp_path / "run").exists()


class _Crash(BaseException):
    """Stands for the end of the process."""


def test_stopped_while_the_held_out_loss_is_measured_it_stops_there_and_no_step_is_lost(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    events: list[Event] = []

    def stop_in_the_first_validation(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.task == "held-out loss" and event.done < event.total:
            _ctrl_c()

    with pytest.raises(StoppedError):
        lopt_lite.train(settings, on_event=stop_in_the_first_validation)
    assert [e.epoch for e in events if isinstance(e, Validation)] == [0]
    assert isinstance(events[-1], Progress)
    lopt_lite.train(settings, on_event=events.append)
    assert sum(isinstance(e, Step) for e in events) == len(steps_of(reference))
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("cut_epoch", [1, 2])
def test_cut_off_while_the_held_out_loss_is_measured_it_is_measured_again(
    inputs, tmp_path, reference, monkeypatch, cut_epoch
):
    """The checkpoint of an epoch's last step stands, so the epoch is not trained again; its loss must still come."""
    validate = block_trainer.BlockTrainer._validate

    def crash(self: Any, epoch: int) -> None:
        if self._is_last and epoch == cut_epoch:
            raise _Crash
        validate(self, epoch)

    settings = _settings(inputs, tmp_path / "run", checkpoint_every="0s")
    with monkeypatch.context() as patch:
        patch.setattr(block_trainer.BlockTrainer, "_validate", crash)
        with pytest.raises(_Crash):
            lopt_lite.train(settings)
    outcome = lopt_lite.train(settings)
    assert outcome.loss_after is not None
    assert_same(tmp_path / "run", reference)


def test_max_hours_stops_with_what_is_done_and_more_hours_end_with_the_same_bytes(
    inputs, tmp_path, reference, monkeypatch
):
    hours = [0.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: hours[0] * 3600))

    def one_hour_per_step(event: Event) -> None:
        if isinstance(event, Step):
            hours[0] += 1

    settings = _settings(inputs, tmp_path / "run", max_hours=12.0)
    done = []
    for _ in range(10):
        try:
            lopt_lite.train(settings, on_event=one_hour_per_step)
        except StoppedError as error:
            assert "stopped after --max-hours 12" in error.found
            done.append(len(steps_of(tmp_path / "run")))
        else:
            break
    assert done == [12, 24, 36]
    assert_same(tmp_path / "run", reference)


def test_a_moment_is_too_little_to_begin_and_nothing_is_spoiled(inputs, tmp_path, reference):
    with pytest.raises(StoppedError, match="--max-hours"):
        lopt_lite.train(_settings(inputs, tmp_path / "run", max_hours=1e-9))
    lopt_lite.train(_settings(inputs, tmp_path / "run"))
    assert_same(tmp_path / "run", reference)


def test_a_finished_run_says_so_and_changes_nothing(inputs, reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*.safetensors")}
    events: list[Event] = []
    outcome = lopt_lite.train(_settings(inputs, reference), on_event=events.append)
    assert outcome.already_done
    assert outcome.steps == len(steps_of(reference))
    assert not any(isinstance(event, (Step, BlockStarted, Progress)) for event in events)
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*.safetensors")} == before


def test_fresh_starts_anew_and_ends_with_the_same_bytes(inputs, tmp_path, reference):
    def stop_in_the_second_block(event: Event) -> None:
        if isinstance(event, Step) and event.block == 1:
            _ctrl_c()

    with pytest.raises(StoppedError):
        lopt_lite.train(_settings(inputs, tmp_path / "run", seed=7), on_event=stop_in_the_second_block)
    with pytest.raises(RunDirectoryError, match="--seed 7, not 0"):
        lopt_lite.train(_settings(inputs, tmp_path / "run"))
    lopt_lite.train(_settings(inputs, tmp_path / "run", fresh=True))
    assert_same(tmp_path / "run", reference)


def test_the_peak_is_of_all_that_was_done_and_not_of_the_steps_alone(inputs, tmp_path, monkeypatch, one_thread):
    """Also of what was done by a process that was stopped, and by passes in which no step is."""
    readings = iter(range(10**9, 2 * 10**9, 1000))
    monkeypatch.setattr(devices.PeakMemory, "read", lambda self: next(readings))
    settings = _settings(inputs, tmp_path / "run")

    def stop_while_caching(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "outputs of block 1":
            _ctrl_c()

    with pytest.raises(StoppedError):
        lopt_lite.train(settings, on_event=stop_while_caching)
    (stopped,) = [fact for fact in read_facts(tmp_path / "run" / "journal.jsonl")[0] if fact["fact"] == "peak"]
    assert stopped["device_bytes"] > max(
        line["device_peak_bytes"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
    )
    outcome = lopt_lite.train(settings)
    last = read_facts(tmp_path / "run" / "journal.jsonl")[0][-1]
    assert last == {"fact": "peak", "device_bytes": outcome.device_peak_bytes}
    assert read_run(str(tmp_path / "run")).peak("device_peak_bytes") == outcome.device_peak_bytes
    assert lopt_lite.train(settings).device_peak_bytes == outcome.device_peak_bytes
