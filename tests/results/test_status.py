"""What a run directory says of itself: what is done, what is next, and how long that will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lopt_lite
from lopt_lite.settings import TrainSettings
from tests.tiny_models import EVERY_BLOCK_LEARNS

#: Of the run below: 80 examples in steps of 8, through two blocks.
PER_EPOCH = 10


class Run:
    """A run directory with what a run has written of itself so far."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        options = {**EVERY_BLOCK_LEARNS, **options}
        settings = TrainSettings(model="m", data="d", batch_size=8, epochs=2, **{"lr": 4e-4, **options})
        content = {
            "settings": settings.result_settings(),
            "model": {"given": "m"},
            "data": {"given": "d"},
            "store": "store",
            "device": "cpu",
        }
        (root / "settings.json").write_text(json.dumps(content))
        self.note("residence", recompute=False)
        self.note("store-ready")
        self.note("started", examples=80)

    def note(self, fact: str, **values: Any) -> None:
        """Add a line to the journal."""
        with open(self.root / "journal.jsonl", "a") as file:
            file.write(json.dumps({"fact": fact, **values}) + "\n")

    def steps(self, block: int, phase: str, count: int, seconds: float) -> None:
        """``count`` optimiser steps of ``seconds`` each, the first of the phase on."""
        with open(self.root / "metrics.jsonl", "a") as file:
            for step in range(1, count + 1):
                line = {"block": block, "phase": phase, "step": step, "loss": 1.0, "tokens": 600}
                file.write(json.dumps({**line, "tokens_per_s": 600 / seconds}) + "\n")

    @property
    def seconds_left(self) -> float | None:
        """What status says."""
        return lopt_lite.status(self.root).seconds_left


def test_before_the_first_step_the_time_is_not_known(tmp_path):
    run = Run(tmp_path)
    assert run.seconds_left is None
    (tmp_path / "journal.jsonl").write_text("")
    assert run.seconds_left is None
    assert lopt_lite.status(tmp_path).next == "prepare the weights"


def test_while_the_head_is_fitted_training_is_expected_to_take_longer(tmp_path):
    run = Run(tmp_path)
    run.steps(0, "head-fit", 4, seconds=1.0)
    # Left: 6 steps of fitting, 20 and 20 of training, and a pass of all examples through block 1.
    assert run.seconds_left == pytest.approx(6 + 40 * 2 + PER_EPOCH)


@pytest.mark.parametrize(("tune", "recompute", "passes"), [("lora", True, 3), ("full", False, 3), ("full", True, 4)])
def test_training_is_expected_to_take_as_many_passes_as_it_makes(tmp_path, tune, recompute, passes):
    run = Run(tmp_path, tune=tune)
    run.note("residence", recompute=recompute)
    run.steps(0, "head-fit", PER_EPOCH, seconds=1.0)
    assert run.seconds_left == pytest.approx(40 * passes + PER_EPOCH)


def test_each_phase_goes_on_at_its_own_pace(tmp_path):
    run = Run(tmp_path)
    run.steps(0, "head-fit", PER_EPOCH, seconds=1.0)
    run.steps(0, "train", 5, seconds=7.0)
    assert run.seconds_left == pytest.approx(15 * 7 + 20 * 7 + PER_EPOCH)
    run.steps(1, "train", 5, seconds=9.0)
    run.note("block", block=0)
    run.note("cache", block=1)
    assert run.seconds_left == pytest.approx(15 * 9)


def test_a_block_that_was_not_begun_is_expected_to_be_like_the_newest_with_its_objective(tmp_path):
    run = Run(tmp_path, blocks=4)
    for block, fit_s, train_s in ((0, 1.0, 5.0), (1, 2.0, 6.0)):
        run.steps(block, "head-fit", PER_EPOCH, seconds=fit_s)
        run.steps(block, "train", 20, seconds=train_s)
        run.note("block", block=block)
        run.note("cache", block=block + 1)
    # Block 3 is fitted and trained, its outputs are written, and block 4 is trained.
    expected = 10 * 2 + 20 * 6 + PER_EPOCH * 2 + 20 * 6
    assert run.seconds_left == pytest.approx(expected)
    run.steps(2, "head-fit", PER_EPOCH, seconds=3.0)
    assert run.seconds_left == pytest.approx(20 * 6 + PER_EPOCH * 3 + 20 * 6)


def test_only_the_newest_steps_say_how_fast_it_is(tmp_path):
    run = Run(tmp_path, blocks=1)
    run.note("started", examples=800)
    run.steps(0, "train", 30, seconds=9.0)
    run.steps(0, "train", 60, seconds=1.0)
    assert run.seconds_left == pytest.approx(140)


def test_without_a_head_to_fit_the_pass_that_writes_the_cache_is_a_part_of_a_training_step(tmp_path):
    run = Run(tmp_path, objective="task")
    run.steps(0, "train", 20, seconds=4.0)
    assert run.seconds_left == pytest.approx(20 * 4 + PER_EPOCH * 2)
    run.note("block", block=0)
    assert lopt_lite.status(tmp_path).next == "cache the outputs of block 1 of 2"
    assert run.seconds_left == pytest.approx(20 * 4 + PER_EPOCH * 2)
    run.note("cache", block=1)
    assert run.seconds_left == pytest.approx(20 * 4)


def test_larger_blocks_take_longer(tmp_path):
    """3 of 30 layers have said how long a step takes; the block with the 27 others has not begun."""
    run = Run(tmp_path, objective="task", last_layers=27)
    content = json.loads((tmp_path / "settings.json").read_text())
    content["model"]["layers"] = 30
    (tmp_path / "settings.json").write_text(json.dumps(content))
    run.steps(0, "train", 20, seconds=1.0)
    run.note("block", block=0)
    cache = PER_EPOCH * 1.0 / 2
    assert run.seconds_left == pytest.approx(cache + 20 * 9.0)
    run.note("cache", block=1)
    run.steps(1, "train", 5, seconds=8.0)
    assert run.seconds_left == pytest.approx(15 * 8.0)


def test_a_block_that_is_left_as_it_is_takes_only_its_pass(tmp_path):
    run = Run(tmp_path, objective="none")
    run.note("block", block=0)
    run.note("cache", block=1)
    run.steps(1, "train", 5, seconds=2.0)
    found = lopt_lite.status(tmp_path)
    assert (found.blocks[0].state, found.blocks[0].steps) == ("done", 0)
    assert found.seconds_left == pytest.approx(15 * 2)


def test_steps_of_both_phases_are_counted_together(tmp_path):
    run = Run(tmp_path)
    run.steps(0, "head-fit", 4, seconds=1.0)
    found = lopt_lite.status(tmp_path)
    assert [(b.state, b.step, b.steps) for b in found.blocks] == [("training", 4, 30), ("waiting", 0, 20)]
    run.steps(0, "train", 3, seconds=1.0)
    found = lopt_lite.status(tmp_path)
    assert found.blocks[0].step == PER_EPOCH + 3
    assert found.next == "train block 1 of 2 (reconstruct), step 13 of 30"


def test_blocks_that_train_together_are_counted_once(tmp_path):
    run = Run(tmp_path, schedule="joint", head_fit_epochs=0)
    run.steps(0, "train", 5, seconds=3.0)
    found = lopt_lite.status(tmp_path)
    assert [(b.objective, b.state, b.step) for b in found.blocks] == [
        ("reconstruct", "training", 5),
        ("task", "training", 5),
    ]
    assert found.next == "train all 2 blocks together (joint), step 5 of 20"
    assert found.seconds_left == pytest.approx(15 * 3)
    run.note("block", block=0)
    run.note("block", block=1)
    assert lopt_lite.status(tmp_path).next == "write the adapter"
    run.note("adapter")
    assert (lopt_lite.status(tmp_path).state, run.seconds_left) == ("done", 0.0)
