"""A run with the 8-bit cache: what it tells, how it goes on, and that it stays near the exact one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.errors import RunDirectoryError, StoppedError
from lopt_lite.events import Event, Notice, Progress
from lopt_lite.journal import read_facts
from lopt_lite.training import activation_cache, sequential
from tests.tiny_models import make_data, make_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several batches and shards, and sums in one order."""
    monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 12 << 10)
    monkeypatch.setattr(sequential, "FORWARD_ROWS", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    return str(make_model(directory / "model")), str(make_data(directory / "data.jsonl", 24))


def _settings(inputs: tuple[str, str], output: Path, **changes: Any) -> TrainSettings:
    values = {"blocks": 2, "batch_size": 4, "validation": "0.2", "quantize": "none", "dtype": "float32", **changes}
    return TrainSettings(model=inputs[0], data=inputs[1], output=str(output), **values)


def _errors(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Notice) and "cache" in e.text]


def _cache_facts(run: Path) -> list[dict[str, Any]]:
    return [fact for fact in read_facts(run / "journal.jsonl")[0] if fact["fact"].startswith("cache")]


def test_the_error_is_measured_told_and_kept_and_the_result_is_near_the_exact_one(inputs, tmp_path):
    events: list[Event] = []
    rough = lopt_lite.train(_settings(inputs, tmp_path / "int8", cache="int8"), on_event=events.append)
    exact = lopt_lite.train(_settings(inputs, tmp_path / "exact"), on_event=events.append)
    (text,) = _errors(events)
    fact = _cache_facts(tmp_path / "int8")[-1]
    assert text == f"the 8-bit cache of block 2 has a relative error of {100 * fact['relative_error']:.2g} %"
    assert 0.001 < fact["relative_error"] < 0.02
    assert "relative_error" not in _cache_facts(tmp_path / "exact")[-1]
    assert rough.loss_before == exact.loss_before
    assert rough.loss_after != exact.loss_after
    assert rough.loss_after == pytest.approx(exact.loss_after, abs=0.02)


def test_stopped_in_the_middle_of_writing_it_ends_with_the_same_bytes_and_the_same_error(inputs, tmp_path):
    told: list[Event] = []
    lopt_lite.train(_settings(inputs, tmp_path / "reference", cache="int8"), on_event=told.append)
    settings = _settings(inputs, tmp_path / "run", cache="int8")
    events: list[Event] = []
    for attempt in range(1, 40):
        outputs: list[Event] = []

        def stop_after_some_outputs(event: Event, outputs: list[Event] = outputs, attempt: int = attempt) -> None:
            events.append(event)
            if isinstance(event, Progress) and event.task.startswith("outputs of block"):
                outputs.append(event)
                if len(outputs) == attempt:
                    os.kill(os.getpid(), signal.SIGINT)

        try:
            lopt_lite.train(settings, on_event=stop_after_some_outputs)
        except StoppedError:
            continue
        break
    assert attempt > 2
    assert len(_cache_facts(tmp_path / "reference")) > 3
    assert _cache_facts(tmp_path / "run") == _cache_facts(tmp_path / "reference")
    assert _errors(events) == _errors(told)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        expected = (tmp_path / "reference" / "adapter" / name).read_bytes()
        assert (tmp_path / "run" / "adapter" / name).read_bytes() == expected


def test_a_run_cannot_go_on_with_another_format(inputs, tmp_path):
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task.startswith("outputs of block"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        lopt_lite.train(_settings(inputs, tmp_path / "run", cache="int8"), on_event=stop)
    with pytest.raises(RunDirectoryError, match="--cache int8, not exact"):
        lopt_lite.train(_settings(inputs, tmp_path / "run"))
