"""metrics.jsonl: what an interrupted run leaves and the resumed one adds are the lines of a whole run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lopt_lite.errors import RunDirectoryError
from lopt_lite.events import Step
from lopt_lite.training.metrics import Metrics, read_metrics

_ORDER = ("head-fit", "train")


def _step(block: int, phase: str, step: int, loss: float = 1.0) -> Step:
    return Step(
        block=block,
        phase=phase,
        epoch=1,
        step=step,
        steps=9,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        tokens=100,
        tokens_per_s=50.0,
        device_peak_bytes=1,
        host_rss_bytes=2,
        time=3.0,
    )


def _places(path: Path) -> list[tuple[int, str, int]]:
    return [(r["block"], r["phase"], r["step"]) for r in read_metrics(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for block in (0, 1):
        for phase in _ORDER:
            for step in (1, 2, 3):
                metrics.add(_step(block, phase, step))
    metrics.close()
    return path


def test_a_line_holds_every_value_of_the_step(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.add(_step(2, "train", 7, loss=0.25))
    (record,) = read_metrics(tmp_path / "m.jsonl")
    expected = _step(2, "train", 7, loss=0.25).to_json()
    assert expected.pop("event") == "Step"
    assert record == expected


def test_a_loss_that_is_not_a_number_is_none_in_plain_json(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.add(_step(0, "train", 1, loss=math.nan))
    assert read_metrics(tmp_path / "m.jsonl")[0]["loss"] is None
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()


def test_lines_after_the_cursor_are_forgotten_and_new_ones_follow(path):
    metrics = Metrics(path)
    metrics.forget_undone(0, _ORDER, "train", 2)
    metrics.add(_step(0, "train", 3))
    metrics.close()
    assert _places(path) == [(0, p, s) for p in _ORDER for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("block", "phase", "step", "left"),
    [
        (0, "head-fit", 0, 0),
        (0, "head-fit", 2, 2),
        (0, "train", 0, 3),
        (1, "head-fit", 0, 6),
        (1, "train", 3, 12),
        (2, "train", 0, 12),
    ],
)
def test_what_is_kept_is_what_was_done(path, block, phase, step, left):
    whole = _places(path)
    Metrics(path).forget_undone(block, _ORDER, phase, step)
    assert _places(path) == whole[:left]


def test_a_torn_last_line_does_not_spoil_the_next_one(path):
    whole = _places(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert _places(path) == whole[:-1], "a torn line is no line"
    metrics = Metrics(path)
    metrics.forget_undone(1, _ORDER, "train", 2)
    metrics.add(_step(1, "train", 3))
    metrics.close()
    assert _places(path) == whole


def test_damaged_lines_are_left_out_of_reading(path):
    whole = _places(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{nonsense\n[1, 2]\n\xff\xfe\n" + b"".join(lines[1:]))
    assert _places(path) == whole


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_file_that_cannot_be_opened_is_an_error_of_the_run_directory(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"cannot open .*none"):
        Metrics(tmp_path / "none" / "metrics.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        '{"block": 0, "phase": "train", "loss": 1.0}',
        '{"block": "0", "phase": "train", "step": 1, "loss": 1.0}',
        '{"block": 0, "phase": "train", "step": 1}',
        '{"block": 0, "phase": "train", "step": 1, "loss": "low"}',
        '{"block": 0, "phase": "train", "step": 1, "loss": 1.0, "tokens": []}',
        '{"block": 0, "phase": 3, "step": 1, "loss": 1.0}',
        "[" * 100_000,
    ],
)
def test_what_is_no_step_is_left_out_and_lost_when_the_run_goes_on(path, line):
    whole = _places(path)
    path.write_text(line + "\n" + path.read_text())
    assert _places(path) == whole
    metrics = Metrics(path)
    metrics.forget_undone(1, _ORDER, "train", 3)
    metrics.close()
    assert _places(path) == whole
    assert line not in path.read_text().splitlines()


def test_a_phase_of_another_version_is_lost_when_the_run_goes_on(path):
    whole = _places(path)
    path.write_text('{"block": 0, "phase": "other", "step": 1, "loss": 1.0}\n' + path.read_text())
    Metrics(path).forget_undone(1, _ORDER, "train", 3)
    assert _places(path) == whole
