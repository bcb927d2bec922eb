"""However often a run is cut off, it ends with the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lopt_lite_cli.main import main

import lopt_lite
from lopt_lite.training.metrics import read_metrics
from tests.tiny_models import make_data, make_model
from tests.training.interruptions import FAULTS, FLOAT, FULL, JOINT, NF4, RECIPE, SHORT_RECIPE, is_harmless
from tests.training.operations import Operation
from tests.training.processes import ROOT, start
from tests.training.same_runs import assert_same
from tests.training.same_runs import steps as steps_of

#: Operations on files that a kind of run is disturbed at; benchmarks/crash.py tries all of them.
_TRIES = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its data."""
    directory = tmp_path_factory.mktemp("inputs")
    model = make_model(directory / "model", "llama", dtype=torch.bfloat16)
    return model, make_data(directory / "data.jsonl", 14)


# -- cut off at random moments ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupter() -> Iterator[subprocess.Popen[str]]:
    """The process whose forks are the runs that are cut off."""
    command = [sys.executable, "-m", "tests.training.interruptions"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _interrupt(
    interrupter: subprocess.Popen[str],
    work: Path,
    inputs: tuple[Path, Path],
    options: list[str],
    mode: str,
    **job: Any,
) -> dict[str, Any]:
    model, data = inputs
    recipe = RECIPE
    if "tries" in job:
        data, recipe = make_data(work / "few.jsonl", 10), SHORT_RECIPE
    job["mode"] = mode
    job["arguments"] = ["train", str(model), str(data), *recipe, *options]
    (work / "job.json").write_text(json.dumps(job))
    assert interrupter.stdin is not None and interrupter.stdout is not None
    print(work / "job.json", file=interrupter.stdin, flush=True)
    assert interrupter.stdout.readline() == "done\n", "the process that cuts runs off has died"
    outcome: dict[str, Any] = json.loads((work / "outcome.json").read_text())
    if "tries" in job:
        return outcome
    said = (work / "log").read_text()
    assert outcome["reference"] == 0, said
    assert outcome["cuts"] >= job["cuts"], outcome
    assert outcome["runs"], outcome
    assert "Traceback" not in said, said
    return outcome


def _assert_all_same(work: Path, outcome: dict[str, Any]) -> None:
    for run in outcome["runs"]:
        assert_same(Path(run), work / "reference")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "mode", "every"), [(NF4, "dequantised", "0s"), (FLOAT, "streamed", "0.1s")])
def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_bytes(
    interrupter, tmp_path, inputs, options, mode, every
):
    outcome = _interrupt(
        interrupter, tmp_path, inputs, [*options, "--checkpoint-every", every], mode, how="kill", cuts=8, seed=1
    )
    assert set(outcome["codes"]) == {0, -signal.SIGKILL}
    assert outcome["codes"].count(-signal.SIGKILL) >= 8
    # On a busy machine some starts are killed before they have come any further.
    assert len(set(map(tuple, outcome["places"]))) >= 2, "the kills must have come at different stages"
    _assert_all_same(tmp_path, outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "mode"), [(NF4, "streamed"), (FLOAT, "resident"), (FULL, "offloaded"), (JOINT, "streamed")]
)
def test_killed_before_or_after_any_operation_on_files_it_ends_with_the_same_bytes(
    interrupter, tmp_path, inputs, options, mode
):
    """Moments that a clock seldom hits: within a write, before and after a rename, a deletion, the journal's line."""
    options = [*options, "--checkpoint-every", "0s"]
    outcome = _interrupt(interrupter, tmp_path, inputs, options, mode, how=["before", "after"], tries=_TRIES, seed=2)
    for one in outcome["tries"]:
        assert one["codes"][0] in (-signal.SIGKILL, 0), one
        assert one["codes"][1] == 0, one
        assert_same(Path(one["run"]), tmp_path / "reference")
    assert sum(one["codes"][0] != 0 for one in outcome["tries"]) >= _TRIES - 2


@pytest.mark.slow
@pytest.mark.parametrize(("options", "mode"), [(NF4, "resident"), (FULL, "offloaded"), (JOINT, "streamed")])
def test_where_any_operation_on_files_fails_it_says_so_and_ends_with_the_same_bytes_afterwards(
    interrupter, tmp_path, inputs, options, mode
):
    options = [*options, "--checkpoint-every", "0s"]
    outcome = _interrupt(interrupter, tmp_path, inputs, options, mode, how=list(FAULTS), tries=_TRIES, seed=5)
    for one in outcome["tries"]:
        code, words = FAULTS[one["how"]]
        if one["codes"] == [0, 0] and is_harmless(Operation(**one["operation"]), one["how"]):
            assert_same(Path(one["run"]), tmp_path / "reference")
            continue
        assert one["codes"] == [code, 0], one
        assert words in one["said"] and "to fix: " in one["said"] and "Traceback" not in one["said"], one
        assert_same(Path(one["run"]), tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "mode", "seed"), [("SIGINT", "resident", 3), ("SIGTERM", "streamed", 4)])
def test_stopped_by_a_signal_at_random_moments_it_ends_with_the_same_bytes(
    interrupter, tmp_path, inputs, how, mode, seed
):
    outcome = _interrupt(
        interrupter, tmp_path, inputs, [*NF4, "--checkpoint-every", "5m"], mode, how=how, cuts=4, seed=seed
    )
    # A SIGTERM that comes before the run has begun ends the process as it ends any.
    expected = {0, 75} if how == "SIGINT" else {0, 75, -signal.SIGTERM}
    assert set(outcome["codes"]) <= expected
    assert outcome["codes"].count(75) >= 3
    _assert_all_same(tmp_path, outcome)


# -- real processes ---------------------------------------------------------------------------------------------------


def _command(inputs: tuple[Path, Path], run: Path) -> list[str]:
    model, data = inputs
    return ["train", str(model), str(data), *RECIPE, *NF4, "--epochs", "12", "--output", str(run), "--json"]


def _wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    end = time.monotonic() + 90
    while len(read_metrics(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "training has not begun"
        time.sleep(0.005)


def _assert_stopped(process: subprocess.Popen[str], how: str) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["exit_code"] == 75
    assert f"stopped by {how}" in err
    assert "same command" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_command_line_stops_with_code_75_and_the_same_command_goes_on(inputs, tmp_path, capsys):
    undisturbed = start(_command(inputs, tmp_path / "reference"))
    run = tmp_path / "run"
    arguments = _command(inputs, run)
    first = start(arguments)
    _wait_for_steps(first, run, 8)

    # Held still in mid-training: a second process on the same run is turned away, and status sees the first one.
    first.send_signal(signal.SIGSTOP)
    capsys.readouterr()
    started = time.monotonic()
    assert main(arguments) == 5
    assert time.monotonic() - started < 5
    assert f"process id {first.pid}" in capsys.readouterr().err
    seen = lopt_lite.status(run)
    assert (seen.state, seen.pid) == ("running", first.pid)
    first.send_signal(signal.SIGCONT)

    first.send_signal(signal.SIGINT)
    _assert_stopped(first, "SIGINT")
    assert lopt_lite.status(run).state == "stopped"
    done = len(steps_of(run))
    second = start(arguments)
    _wait_for_steps(second, run, done + 20)
    second.send_signal(signal.SIGTERM)
    _assert_stopped(second, "SIGTERM")

    third = start(arguments)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0, err
    assert json.loads(out)["already_done"] is False
    out, err = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, err
    assert_same(run, tmp_path / "reference")

    capsys.readouterr()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["already_done"] is True
