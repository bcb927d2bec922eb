"""What is refused before an earlier run is touched, and where a run finds its store and tokenizer later on."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lopt_lite
from lopt_lite import EvaluateSettings, PlanSettings, QuantizeSettings, TrainSettings, devices
from lopt_lite.errors import DoesNotFitError, RunDirectoryError, SettingsError, StoppedError
from lopt_lite.events import Event, Progress
from lopt_lite.results.open_run import open_run
from lopt_lite.training import disk_plan
from tests.data.tiny_tokenizers import make_tokenizer
from tests.rig import CPU
from tests.tiny_models import make_data, make_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 8)


def _train(inputs: tuple[Path, Path], output: Path, on_event: Any = lambda event: None, **changes: Any) -> Any:
    values = {"objective": "none", "device": "cpu", **changes}
    settings = TrainSettings(model=str(inputs[0]), data=str(inputs[1]), output=str(output), **values)
    return lopt_lite.train(settings, on_event=on_event)


def _content(run: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.name.startswith("lock")
    }


def test_a_fresh_start_that_does_not_fit_leaves_the_earlier_run_as_it_is(inputs, tmp_path):
    run = tmp_path / "run"
    _train(inputs, run)
    before = _content(run)
    with pytest.raises(DoesNotFitError):
        _train(inputs, run, fresh=True, memory="100MiB")
    assert _content(run) == before


def test_a_fresh_start_does_not_delete_what_it_is_to_read(inputs, tmp_path):
    """The model that an earlier run made, or its store, given as MODEL; or data that was put there."""
    run = tmp_path / "run"
    _train(inputs, run, tune="full")
    moved = run / "cache" / "data.jsonl"
    moved.parent.mkdir(exist_ok=True)
    shutil.copy(inputs[1], moved)
    before = _content(run)
    for given in ((run / "model", inputs[1]), (run / "store", inputs[1]), (inputs[0], moved)):
        with pytest.raises(RunDirectoryError, match="--fresh would delete") as refused:
            _train(given, run, fresh=True, tune="full")
        assert "--output" in refused.value.fix
        assert _content(run) == before
    _train(inputs, run, fresh=True, tune="full", store=str(run / "store"))


@pytest.mark.parametrize("part", ["", "adapter", "cache/store", "store/inside"])
@pytest.mark.parametrize("operation", ["train", "plan"])
def test_a_store_does_not_lie_where_something_else_of_the_run_does(operation, part, inputs, tmp_path):
    """In the run directory itself it would wait for the lock that the run has."""
    run = tmp_path / "run"
    values = {"model": str(inputs[0]), "data": str(inputs[1]), "output": str(run), "store": str(run / part)}
    with pytest.raises(SettingsError, match=r"--store .* is the run directory .* or a part of it"):
        if operation == "train":
            lopt_lite.train(TrainSettings(**values))
        else:
            lopt_lite.plan(PlanSettings(**values))
    assert not run.exists()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("operation", ["train", "plan"])
def test_a_place_that_holds_something_else_is_refused(operation, fresh, inputs, tmp_path):
    """Also by a plan, which shows the command to run."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    for place in (mine, mine / "thesis.txt"):
        values = {"model": str(inputs[0]), "data": str(inputs[1]), "output": str(place), "fresh": fresh}
        with pytest.raises(RunDirectoryError):
            if operation == "train":
                lopt_lite.train(TrainSettings(**values))
            else:
                lopt_lite.plan(PlanSettings(**values))


def test_after_a_budget_was_refused_another_one_begins_the_run(inputs, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DoesNotFitError):
        _train(inputs, run, memory="100MiB")
    assert _content(run) == {}
    _train(inputs, run, memory="8GiB")


def test_a_budget_that_reading_has_exceeded_already_is_refused(inputs, tmp_path, monkeypatch):
    """What training takes would fit, but data and tokenizer have taken more while they were read."""
    run = tmp_path / "run"
    monkeypatch.setattr(devices.PeakMemory, "read", lambda peak: 9 << 30)
    with pytest.raises(DoesNotFitError, match=r"8,192 MiB .* reading .* took 9,216 MiB\n.*at least --memory 9224MiB"):
        _train(inputs, run, memory="8GiB")
    assert _content(run) == {}
    _train(inputs, run, memory="9224MiB")


def test_of_a_run_that_is_done_another_budget_asks_for_nothing(inputs, tmp_path):
    _train(inputs, tmp_path / "run")
    assert _train(inputs, tmp_path / "run", memory="8GiB").already_done
    with pytest.raises(RunDirectoryError, match="with --seed 0, not 1\n"):
        _train(inputs, tmp_path / "run", memory="8GiB", seed=1)


def test_a_disk_that_cannot_hold_the_run_is_refused_before_anything_is_written(inputs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_plan.shutil, "disk_usage", lambda path: usage(0, 0, 100_000))
    with pytest.raises(DoesNotFitError, match="100,000"):
        _train(inputs, tmp_path / "run")
    assert _content(tmp_path / "run") == {}


def test_other_tokens_of_the_same_file_are_not_told_as_another_file(inputs, tmp_path):
    _train(inputs, tmp_path / "run")
    with pytest.raises(RunDirectoryError) as caught:
        _train(inputs, tmp_path / "run", max_length=20)
    assert "--max-length 1024, not 20" in caught.value.found
    assert "DATA" not in caught.value.found


def test_a_store_that_was_moved_is_found_again_once_the_run_was_told(inputs, tmp_path):
    run, first, second = tmp_path / "run", tmp_path / "first", tmp_path / "second"
    _train(inputs, run, store=str(first))
    first.rename(second)
    assert _train(inputs, run, store=str(second)).already_done
    lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(inputs[1]), device="cpu"))


def test_a_store_that_was_begun_in_the_run_directory_does_not_hide_the_one_that_was_used(inputs, tmp_path):
    run = tmp_path / "run"

    def stop_while_the_store_is_made(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "quantising" and event.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        _train(inputs, run, stop_while_the_store_is_made)
    assert (run / "store").is_dir()
    _train(inputs, run, store=str(tmp_path / "elsewhere"))
    lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(inputs[1]), device="cpu"))


def test_a_run_is_tried_with_the_tokenizer_that_it_trained_with(inputs, tmp_path):
    base, own = tmp_path / "base", tmp_path / "own"
    shutil.copytree(inputs[0], base)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    own.mkdir()
    tokenizer.chat_template = "{% for m in messages %}<<{{ m['role'] }}>>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(own)
    shutil.copy(inputs[0] / "config.json", own)
    store = tmp_path / "store"
    lopt_lite.quantize(QuantizeSettings(model=str(base), store=str(store), device="cpu"))
    assert AutoTokenizer.from_pretrained(store).chat_template is None
    outcome = _train((store, inputs[1]), tmp_path / "run", config=(str(own),), validation=str(inputs[1]))
    run = open_run(str(tmp_path / "run"), CPU)
    assert run.tokenizer.chat_template == tokenizer.chat_template
    run.close()
    measured = lopt_lite.evaluate(EvaluateSettings(run=str(tmp_path / "run"), data=str(inputs[1]), device="cpu"))
    assert measured.tuned_loss == pytest.approx(outcome.loss_after, rel=1e-3)


@pytest.mark.parametrize("name", ["stores/tiny", "./stores/../stores/tiny/"])
def test_a_model_that_is_its_own_store_may_be_named_so_in_any_way(inputs, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lopt_lite.quantize(QuantizeSettings(model=str(inputs[0]), store="stores/tiny", device="cpu"))
    before = sorted(Path("stores/tiny").iterdir())
    _train((Path("stores/tiny"), inputs[1]), Path("run"), store=name)
    assert sorted(Path("stores/tiny").iterdir()) == before
    assert not Path("run/store").exists()
