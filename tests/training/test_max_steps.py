"""A run that is told how many steps to take, in place of how many passes over the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
from cli.main import main
from lopt_lite import TrainSettings
from lopt_lite.errors import RunDirectoryError
from lopt_lite.events import BlockStarted, Event, Validation
from lopt_lite.results.run_record import read_run
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model
from tests.training.same_runs import assert_same

#: 20 examples to train on, 4 at a time.
_PER_EPOCH = 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its data."""
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama", dtype=torch.bfloat16), make_data(directory / "data.jsonl", 25)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values = {"batch_size": 4, "validation": "0.2", "quantize": "none", "dtype": "float32", **changes}
    return TrainSettings(model=str(model), data=str(data), output=str(output), **values)


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [EVERY_BLOCK_LEARNS, {"schedule": "joint"}], ids=["sequential", "joint"])
def test_as_many_steps_as_the_passes_have_give_the_same_run(inputs, tmp_path, one_thread, changes):
    lopt_lite.train(_settings(inputs, tmp_path / "passes", epochs=2, **changes))
    lopt_lite.train(_settings(inputs, tmp_path / "steps", max_steps=2 * _PER_EPOCH, **changes))
    assert_same(tmp_path / "steps", tmp_path / "passes")


def test_it_ends_within_a_pass_with_the_rate_at_its_end_and_a_held_out_loss(inputs, tmp_path, one_thread):
    events: list[Event] = []
    settings = {"lr": 1e-3, "retain": 0.0, **EVERY_BLOCK_LEARNS}
    outcome = lopt_lite.train(_settings(inputs, tmp_path / "cut", max_steps=8, **settings), on_event=events.append)
    lopt_lite.train(_settings(inputs, tmp_path / "whole", epochs=2, **settings))

    def of_last(run: str) -> list[dict[str, Any]]:
        return [line for line in _lines(tmp_path / run) if (line["block"], line["phase"]) == (1, "train")]

    cut, whole = of_last("cut"), of_last("whole")
    assert [line["epoch"] for line in cut] == [1] * _PER_EPOCH + [2] * 3
    assert {line["steps"] for line in cut} == {8}
    # The examples of each step are those that the whole passes have.
    assert [line["tokens"] for line in cut] == [line["tokens"] for line in whole][:8]
    assert cut[-1]["lr"] < 0.1 * 1e-3 < whole[7]["lr"]
    fits = [line for line in _lines(tmp_path / "cut") if line["phase"] == "head-fit"]
    assert len(fits) == _PER_EPOCH, "the head is fitted for passes of its own"
    assert [(e.epoch, e.epochs) for e in events if isinstance(e, Validation)] == [(0, 2), (1, 2), (2, 2)]
    assert {e.steps for e in events if isinstance(e, BlockStarted)} == {_PER_EPOCH, 8}
    assert outcome.loss_after is not None and outcome.loss_after != outcome.loss_before


def test_less_than_one_pass_is_enough(inputs, tmp_path, one_thread):
    outcome = lopt_lite.train(_settings(inputs, tmp_path / "run", max_steps=2))
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 2]
    assert outcome.loss_after is not None


def test_what_a_run_says_of_itself_counts_its_own_steps(inputs, tmp_path, one_thread, capsys):
    run = tmp_path / "run"
    lopt_lite.train(_settings(inputs, run, max_steps=8))
    status = lopt_lite.status(run)
    assert [(block.step, block.steps) for block in status.blocks] == [(0, 0), (8, 8)]
    assert status.loss_after is not None and status.seconds_left in (None, 0.0)
    record = read_run(str(run))
    assert (record.step_counts.train, record.step_counts.epochs, record.step_counts.at_end_of(2)) == (8, 2, 8)
    assert main(["report", str(run)]) == 0
    assert "after epoch" not in (run / "report.html").read_text().split("Held-out loss")[1].split("</")[0]
    model, data = inputs
    options = ["--batch-size", "4", "--validation", "0.2", "--max-steps", "8", "--quantize", "none"]
    capsys.readouterr()
    assert main(["plan", str(model), str(data), "--output", str(tmp_path / "other"), *options]) == 0
    assert "5 for a pass over the data, 8 in all" in capsys.readouterr().out


def test_it_is_told_that_passes_do_not_count_then(inputs, tmp_path):
    said = _settings(inputs, tmp_path / "run", max_steps=8, epochs=3).without_effect()
    assert said == ["--epochs has no effect: --max-steps says how long each block is trained"]
    assert _settings(inputs, tmp_path / "run", max_steps=8).without_effect() == []


def test_another_number_is_another_run(inputs, tmp_path, one_thread):
    run = tmp_path / "run"
    lopt_lite.train(_settings(inputs, run, max_steps=2))
    for other, said in ((None, "--max-steps 2, which is not given"), (3, "--max-steps 2, not 3")):
        with pytest.raises(RunDirectoryError, match=said):
            lopt_lite.train(_settings(inputs, run, max_steps=other))
