"""Runs that share one store at the same time: one makes it, the other waits, and both end with the right bytes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lopt_lite.journal import read_facts
from tests.tiny_models import make_data, make_model
from tests.training.processes import start
from tests.training.same_runs import differences

_OPTIONS = ["--quantize", "nf4", "--dtype", "bfloat16", "--batch-size", "4", "--device", "cpu"]


def _start(inputs: tuple[Path, Path], output: Path, *more: str) -> subprocess.Popen[str]:
    model, data = inputs
    arguments = ["train", str(model), str(data), "--output", str(output), *_OPTIONS, *more]
    return start(arguments)


def _end(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return err


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with enough layers for the making of its store to take a while, and data."""
    directory = tmp_path_factory.mktemp("inputs")
    model = make_model(directory / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=12, hidden_size=64)
    return model, make_data(directory / "data.jsonl", 8)


@pytest.mark.slow
def test_both_end_with_the_bytes_of_a_run_with_a_store_of_its_own(inputs, tmp_path):
    alone = _start(inputs, tmp_path / "alone")
    _end(alone)
    store = tmp_path / "store"
    both = [_start(inputs, tmp_path / name, "--store", str(store)) for name in ("one", "other")]
    for process in both:
        _end(process)
    for name in ("one", "other"):
        # A store elsewhere is no file of the run.
        found = differences(tmp_path / name, tmp_path / "alone")
        assert all("store" in text for text in found), found
        adapter = "adapter/adapter_model.safetensors"
        assert (tmp_path / name / adapter).read_bytes() == (tmp_path / "alone" / adapter).read_bytes()
    for shard in (tmp_path / "alone" / "store").glob("*.safetensors"):
        assert (store / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_when_the_one_that_makes_the_store_is_killed_the_other_goes_on_with_it(inputs, tmp_path):
    store = tmp_path / "store"
    first = _start(inputs, tmp_path / "first", "--store", str(store))
    end = time.monotonic() + 60
    while not list(store.glob("layer-*.safetensors")):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = _start(inputs, tmp_path / "second", "--store", str(store))
    # The second one waits for the lock; then its holder dies.
    while not (tmp_path / "second" / "journal.jsonl").exists():
        assert second.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    first.kill()
    first.communicate()
    _end(second)
    _end(_start(inputs, tmp_path / "first", "--store", str(store)))
    adapters = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("first", "second")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert read_facts(tmp_path / "first" / "journal.jsonl")[0][0]["fact"] == "residence"
