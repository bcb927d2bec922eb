"""SIGTERM and SIGHUP end a command as Ctrl-C does, and the same command goes on where it can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lopt_lite_cli.main import COMMANDS
from lopt_lite_cli.signals import EndingSignals

import lopt_lite
from lopt_lite import outcomes
from lopt_lite.checkpoints import build_store
from lopt_lite.training.stopping import Stopper
from tests.tiny_models import make_model

ARGUMENTS = {
    "train": ("m", "d"),
    "plan": ("m", "d"),
    "status": ("r",),
    "report": ("r",),
    "evaluate": ("r", "d"),
    "generate": ("r", "--prompt", "p"),
    "export": ("r", "out"),
    "quantize": ("m", "s"),
}
ENDING = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def a_terminal_in_the_foreground() -> Iterator[None]:
    """The suite may itself run under ``nohup`` or in a script's background, where signals are ignored."""
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, interrupt)


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, *ENDING)]


def test_all_commands_are_tried_here():
    assert {command.name for command in COMMANDS} == set(ARGUMENTS)


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_a_signal_ends_a_command_with_code_75_and_one_document(lopt, monkeypatch, name, number):
    def operation(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    monkeypatch.setitem(lopt_lite.__dict__, name, operation)
    before = _handlers()
    result = lopt(name, *ARGUMENTS[name], "--json")
    assert result.code == 75
    assert result.json() == {
        "error": "Interrupted",
        "exit_code": 75,
        "found": "stopped",
        "expected": None,
        "fix": "give the same command again to go on",
    }
    assert result.err == "stopped\n  to go on: give the same command again to go on\n"
    assert _handlers() == before


def test_signals_that_come_while_the_result_is_printed_neither_cut_nor_repeat_it(lopt, monkeypatch):
    class Outcome(outcomes.ExportOutcome):
        def to_json(self) -> dict[str, Any]:
            for number in (signal.SIGINT, *ENDING):
                os.kill(os.getpid(), number)
            return super().to_json()

    outcome = Outcome(out="out", format="adapter", onto=None, bytes=1)
    monkeypatch.setitem(lopt_lite.__dict__, "export", lambda settings, on_event: outcome)
    result = lopt("export", "r", "out", "--json")
    assert (result.code, result.json()["out"]) == (0, "out")


def test_a_second_signal_does_not_cut_the_message_of_the_first(lopt, monkeypatch):
    def operation(settings: Any, on_event: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(lopt_lite.__dict__, "export", operation)
    result = lopt("export", "r", "out", "--json")
    assert (result.code, result.json()["exit_code"]) == (75, 75)


def test_a_training_takes_signals_itself_once_it_has_begun(lopt, fake, trained, monkeypatch):
    def operation(settings: Any, on_event: Any) -> Any:
        with Stopper() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason() == "stopped by SIGTERM"
        return trained

    monkeypatch.setitem(lopt_lite.__dict__, "train", operation)
    assert lopt("train", "m", "d").code == 0


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with EndingSignals():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = _handlers(), []

    def work() -> None:
        with EndingSignals():
            seen.append(_handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_store_that_sigterm_has_cut_off_is_gone_on_with(lopt, tmp_path, monkeypatch):
    command = ["quantize", str(make_model(tmp_path / "model")), str(tmp_path / "store"), "--device", "cpu", "--json"]
    write_shard, made = build_store.write_shard, []

    def counted(path: Path, *arguments: Any, **named: Any) -> Any:
        record = write_shard(path, *arguments, **named)
        made.append(path.name)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(build_store, "write_shard", counted)
    result = lopt(*command)
    assert (result.code, result.json()["error"]) == (75, "Interrupted")
    assert lopt(*command).json()["shards"] == 6
    # The one whose line in the journal had not been written is made again.
    assert made == [*made[:2], made[1], *made[3:]] and len(set(made)) == 6


@pytest.mark.parametrize("number", ENDING)
def test_a_process_that_is_ended_by_a_signal_says_so(number):
    code = (
        "import sys, time, lopt_lite\n"
        "from lopt_lite_cli.main import run\n"
        "def operation(settings, on_event):\n"
        "    print('at work', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "lopt_lite.__dict__['evaluate'] = operation\n"
        "run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "evaluate", "r", "d", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "at work\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert json.loads(out)["exit_code"] == 75
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_signal_that_comes_when_all_is_done_changes_nothing(number):
    code = (
        "import atexit, os, lopt_lite\n"
        "from lopt_lite.outcomes import ExportOutcome\n"
        "from lopt_lite_cli.main import run\n"
        f"atexit.register(os.kill, os.getpid(), {int(number)})\n"
        "outcome = ExportOutcome(out='out', format='adapter', onto=None, bytes=1)\n"
        "lopt_lite.__dict__['export'] = lambda settings, on_event: outcome\n"
        "run()\n"
    )
    command = [sys.executable, "-c", code, "export", "r", "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["out"] == "out"
