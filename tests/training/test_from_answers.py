"""The learning rate that nobody gave follows from how likely the answers are (the anchor's weight: test_anchors)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lopt_lite
from lopt_lite import TrainSettings, recipe
from lopt_lite.errors import DivergedError, RunDirectoryError, StoppedError
from lopt_lite.events import Event, Progress, Step
from lopt_lite.journal import last_fact, read_facts
from lopt_lite.training import stopping
from tests.tiny_models import make_data, make_model

#: Of a tiny Llama, whose random answers cost it as many nats as the vocabulary has room for.
_LAW = 1.4e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 12)


def _settings(inputs: tuple[Path, Path], run: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values: dict[str, Any] = {"dtype": "float32", "epochs": 2, "batch_size": 4, **changes}
    return TrainSettings(model=str(model), data=str(data), output=str(run), **values)


def _train(inputs: tuple[Path, Path], run: Path, **changes: Any) -> list[Event]:
    events: list[Event] = []
    lopt_lite.train(_settings(inputs, run, **changes), events.append)
    return events


def _rates(events: list[Event]) -> list[float]:
    return [event.lr for event in events if isinstance(event, Step) and event.phase == "train"]


def _found(run: Path) -> dict[str, Any] | None:
    return last_fact(read_facts(run / "journal.jsonl")[0], "learning-rate")


def _weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"blocks": 1}, {"retain": 0.0}, {"retain": 0.5}], ids=str)
def test_the_rate_follows_from_the_answers_where_nobody_gives_one(tmp_path, inputs, changes):
    run = tmp_path / "run"
    events = _train(inputs, run, **changes)
    found = _found(run)
    assert found["lr"] == recipe.short_run_rate(_LAW, found["loss"], 6) != _LAW
    assert max(_rates(events)) == found["lr"]
    measured = [e for e in events if isinstance(e, Progress) and e.task == "how likely the answers are"]
    assert sum(event.done == event.total for event in measured) == 1, "once for the weight and the rate"
    weight = last_fact(read_facts(run / "journal.jsonl")[0], "anchor-weight")
    assert weight is None or weight["loss"] == found["loss"]
    assert json.loads((run / "settings.json").read_text())["settings"]["lr"] is None

    given = _train(inputs, tmp_path / "given", lr=found["lr"], **changes)
    assert _found(tmp_path / "given") is None
    assert _rates(given) == _rates(events)
    assert _weights(tmp_path / "given") == _weights(run)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [({"lr": _LAW}, _LAW), ({"schedule": "joint"}, 4e-4), ({"tune": "full", "quantize": "none"}, 2e-5)],
    ids=str,
)
def test_a_rate_that_is_given_stays(tmp_path, inputs, changes, rate):
    run = tmp_path / "run"
    events = _train(inputs, run, **changes)
    assert _found(run) is None
    assert max(_rates(events)) == rate


def test_earlier_blocks_keep_a_tenth_of_the_models_rate(tmp_path, inputs):
    events = _train(inputs, tmp_path / "run", objective="task")
    first = [event.lr for event in events if isinstance(event, Step) and event.block == 0]
    assert max(first) == pytest.approx(_LAW / 10)


def test_a_run_that_goes_on_keeps_its_rate(tmp_path, inputs, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _train(inputs, whole)
    _stop_in_the_second_step(inputs, cut)
    monkeypatch.setattr(recipe, "short_run_rate", lambda *_: pytest.fail("it is a fact"))
    _train(inputs, cut)
    assert _weights(cut) == _weights(whole)


@pytest.mark.parametrize(("began", "goes_on"), [({}, {"lr": _LAW}), ({"lr": _LAW}, {})], ids=("not given", "given"))
def test_the_models_rate_and_none_are_not_the_same(tmp_path, inputs, began, goes_on):
    """Where nobody gives it, the answers change it: a run keeps to what it was told."""
    run = tmp_path / "run"
    _stop_in_the_second_step(inputs, run, **began)
    with pytest.raises(
        RunDirectoryError, match="no --lr, not 0.0014" if goes_on else "--lr 0.0014, which is not given"
    ):
        _train(inputs, run, **goes_on)
    _train(inputs, run, **began)


def test_a_long_run_has_the_models_rate_and_asks_no_answers(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(recipe, "is_short", lambda steps: steps < 6)
    events = _train(inputs, tmp_path / "run", retain=0.0)
    assert max(_rates(events)) == _found(tmp_path / "run")["lr"] == _LAW
    assert not any(isinstance(e, Progress) and e.task == "how likely the answers are" for e in events)


def test_all_blocks_have_one_rate_where_the_paper_has(tmp_path, inputs):
    changes = {"preset": "paper", "schedule": "sequential", "tune": "lora", "quantize": "nf4", "objective": "task"}
    events = _train(inputs, tmp_path / "run", **changes)
    for block in range(2):
        assert max(e.lr for e in events if isinstance(e, Step) and e.block == block) == _LAW


def _stop_in_the_second_step(inputs: tuple[Path, Path], run: Path, **changes: Any) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.block == 1 and event.step == 2:
            raise stopping.stopped("the test")

    with pytest.raises(StoppedError):
        lopt_lite.train(_settings(inputs, run, checkpoint_every="0s", **changes), stop)


def test_a_model_without_a_finite_loss_is_refused_before_anything_follows_from_it(tmp_path, inputs):
    broken = _broken(inputs, tmp_path)
    for validation, examples in ((None, "training"), ("0.25", "held-out")):
        run = tmp_path / examples
        with pytest.raises(DivergedError, match=f"loss of the {examples} examples is nan") as caught:
            _train(broken, run, validation=validation)
        assert "--quantize none" in caught.value.fix
        facts = {fact["fact"] for fact in read_facts(run / "journal.jsonl")[0]}
        assert not facts & {"anchor-weight", "learning-rate", "validation"}


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_whose_steps_were_all_skipped_is_not_done(tmp_path, inputs, epochs):
    """Four skipped steps in a row are not yet too many for a run that goes on."""
    run = tmp_path / "run"
    with pytest.raises(DivergedError, match="not finite in any step so far") as caught:
        _train(_broken(inputs, tmp_path), run, lr=1e-3, retain=0.0, epochs=epochs)
    assert "checkpoint" not in caught.value.fix
    assert not (run / "adapter").exists()


def _broken(inputs: tuple[Path, Path], directory: Path) -> tuple[Path, Path]:
    """A model of finite weights whose final norm is so large that logits are not."""
    model, data = inputs
    broken = directory / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    return broken, data
