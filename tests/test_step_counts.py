"""How many steps a run takes."""

from __future__ import annotations

import pytest

from lopt_lite.step_counts import StepCounts, step_counts


def _counts(examples: int, *, epochs: int = 1, max_steps: int | None = None) -> StepCounts:
    return step_counts(examples, batch_size=8, epochs=epochs, head_fit_epochs=1, max_steps=max_steps)


@pytest.mark.parametrize(
    ("examples", "epochs", "max_steps", "train", "begun", "passes"),
    [
        (80, 1, None, 10, 1, 1.0),
        (81, 3, None, 33, 3, 3.0),
        (80, 1, 4, 4, 1, 0.4),
        (80, 1, 10, 10, 1, 1.0),
        (80, 1, 11, 11, 2, 1.1),
        (80, 5, 25, 25, 3, 2.5),
        (3, 1, 2, 2, 2, 2.0),
    ],
)
def test_training_takes_its_passes_or_as_many_steps_as_are_asked_for(examples, epochs, max_steps, train, begun, passes):
    counts = _counts(examples, epochs=epochs, max_steps=max_steps)
    assert (counts.train, counts.epochs, counts.passes) == (train, begun, passes)
    assert counts.head_fit == min(counts.per_epoch, max_steps or counts.per_epoch)


def test_epochs_end_with_their_steps_and_the_last_with_training():
    counts = _counts(80, max_steps=25)
    assert [counts.at_end_of(epoch) for epoch in (0, 1, 2, 3)] == [0, 10, 20, 25]


@pytest.mark.parametrize("max_steps", [None, 5])
def test_before_the_data_are_read_there_are_none(max_steps):
    counts = _counts(0, max_steps=max_steps)
    assert (counts.per_epoch, counts.train, counts.epochs, counts.passes) == (0, 0, 0, 0.0)
