"""Progress: lines where there is no terminal, one live display where there is, only notices with --quiet."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from lopt_lite_cli.display import Display
from lopt_lite_cli.plain_display import PlainDisplay
from lopt_lite_cli.progress_state import ProgressState

from lopt_lite import errors, events

RUN = events.RunStarted(
    run="runs/x",
    model="some-model",
    data="d.jsonl",
    examples=320,
    validation_examples=40,
    tokens=50_000,
    answer_tokens=30_000,
    blocks=2,
    layers=30,
    device="cpu",
    resumed=False,
)


def block_started(steps: int = 100, step: int = 0, block: int = 0) -> events.BlockStarted:
    return events.BlockStarted(
        block=block, blocks=2, objective="reconstruct", first_layer=0, end_layer=15, step=step, steps=steps
    )


def step(number: int, steps: int = 100, **changes: object) -> events.Step:
    values = {
        "block": 0,
        "phase": "train",
        "epoch": 1,
        "step": number,
        "steps": steps,
        "loss": 1.5,
        "lr": 1e-4,
        "grad_norm": 1.0,
        "tokens": 800,
        "tokens_per_s": 1234.5,
        "device_peak_bytes": 2**30,
        "host_rss_bytes": 2**29,
        "time": 0.0,
    }
    return events.Step(**{**values, **changes})  # type: ignore[arg-type]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def plain_lines(seconds_per_step: float, steps: int) -> list[str]:
    lines: list[str] = []
    clock = Clock()
    display = PlainDisplay(lines.append, clock=clock)
    display.update(block_started(steps))
    for number in range(1, steps + 1):
        clock.now_s += seconds_per_step
        display.update(step(number, steps))
    return lines


def test_a_line_tells_block_objective_step_loss_speed_time_left_and_memory():
    lines = plain_lines(seconds_per_step=2.0, steps=100)
    assert lines[0] == "block 1 of 2 (layers 1-15): reconstruct, 100 steps"
    assert lines[1] == "  block 1  epoch 1  step 10/100  loss 1.5000  1,234 tokens/s  3m 00s left  memory 512 MiB"


def test_on_an_accelerator_device_and_host_memory_are_told_apart():
    state = ProgressState(Clock())
    state.update(events.RunStarted(**{**RUN.__dict__, "device": "cuda"}))
    state.update(step(1))
    assert state.step_parts()[-1] == "device 1.00 GiB, host 512 MiB"


def test_the_phase_is_named_when_it_is_not_training():
    state = ProgressState(Clock())
    state.update(step(1, phase="head-fit"))
    assert state.step_parts()[0] == "head-fit"


@pytest.mark.parametrize(
    ("seconds_per_step", "steps", "most"),
    [(0.001, 10_000, 3), (2.0, 100, 12), (6.0, 6_000, 615), (100.0, 20, 21)],
)
def test_lines_do_not_flood_and_the_last_step_is_always_shown(seconds_per_step, steps, most):
    lines = plain_lines(seconds_per_step, steps)
    assert len(lines) <= most
    assert f"step {steps}/{steps}" in lines[-1]


def test_slow_steps_are_never_silent_for_much_longer_than_a_minute():
    assert len(plain_lines(6.0, 600)) >= 60


def test_validation_block_ends_and_progress_of_other_work_are_lines():
    lines: list[str] = []
    display = PlainDisplay(lines.append, clock=Clock())
    for done in range(1, 33):
        display.update(events.Progress(task="quantising", done=done, total=32, unit="shards"))
    display.update(events.Validation(epoch=0, epochs=2, loss=1.5, answer_tokens=10))
    display.update(events.Validation(epoch=2, epochs=2, loss=1.25, answer_tokens=10))
    display.update(events.BlockDone(block=1, blocks=2))
    assert lines == [
        "  quantising: 32/32 shards",
        "held-out loss before training: 1.5000 nats per answer token",
        "held-out loss after epoch 2 of 2: 1.2500 nats per answer token",
        "block 2 of 2 done",
    ]


def test_other_work_between_steps_does_not_spoil_the_time_left():
    clock = Clock()
    state = ProgressState(clock)
    state.update(block_started())
    for number in range(1, 11):
        clock.now_s += 1.0
        state.update(step(number))
    clock.now_s += 1000.0
    state.update(events.Progress(task="held-out loss", done=1, total=2, unit="batches"))
    state.update(step(11))
    assert state.seconds_left == pytest.approx(89.0)


def test_quiet_shows_notices_alone():
    stream = io.StringIO()
    with Display(quiet=True, stream=stream) as display:
        decided = events.Notice(text="so the rate is 1", ordinary=True)
        for event in (RUN, block_started(), step(100), decided, events.Notice(text="3 examples were cut")):
            display.on_event(event)
    assert stream.getvalue() == "note: 3 examples were cut\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_escape_sequences_in_events_are_not_obeyed(kind, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = kind()
    with Display(stream=stream) as display:
        display.on_event(events.RunStarted(**{**RUN.__dict__, "model": "\x1b]0;owned\x07[bold]x[/bold]"}))
        display.on_event(events.Notice(text="\x1b[2Jgone\nnote: forged"))
        display.on_event(events.Progress(task="\x1b[2J", done=1, total=2, unit="x"))
    shown = stream.getvalue()
    assert "\x07" not in shown
    assert "\x1b]0;" not in shown
    assert "\x1b[2J" not in shown
    assert "[bold]x[/bold]" in shown
    assert "\nnote: forged" not in shown


def test_on_a_terminal_one_region_shows_block_step_loss_and_memory(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Display(stream=stream) as display:
        for event in (RUN, block_started(), step(50), events.Notice(text="take note")):
            display.on_event(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for part in ("some-model", "block 1 of 2 (layers 1-15): reconstruct", "step 50/100", "loss 1.5000", "memory 512"):
        assert part in shown
    assert "note: take note" in shown


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_training_goes_on_when_nobody_reads_the_progress_any_more(kind):
    class Gone(kind):  # type: ignore[misc, valid-type]
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Display(stream=Gone()) as display:
        for event in (RUN, block_started(), step(100)):
            display.on_event(event)


def test_the_display_leaves_standard_output_alone(lopt, fake, trained):
    fake("train", trained, events=(RUN, block_started(), step(100), events.Notice(text="take note")))
    result = lopt("train", "m", "d")
    assert "done in" in result.out and "step 100/100" not in result.out
    assert "step 100/100" in result.err
    assert "note: take note" in result.err
    assert sys.stdout is not None


def test_with_json_every_event_of_a_training_is_one_line_of_json(lopt, fake, trained):
    happened = (RUN, block_started(), step(1, loss=float("nan")), step(2), events.Notice(text="a\x1b[31m\nb"))
    fake("train", trained, events=happened)
    result = lopt("train", "m", "d", "--json")
    assert result.json() == trained.to_json()
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert [line["event"] for line in lines] == ["RunStarted", "BlockStarted", "Step", "Step", "Notice"]
    assert lines[2]["loss"] is None and lines[3] == step(2).to_json()
    assert "\x1b" not in result.err


def test_with_json_events_say_what_is_there_to_the_last_space(capsys):
    event = events.Notice(text="in runs/my  run\tand  \x1b[2J \u202e", ordinary=False)
    with Display(json_lines=True) as display:
        display.on_event(event)
    written = capsys.readouterr().err
    assert json.loads(written) == event.to_json()
    assert written.isascii() and "\x1b" not in written


def test_with_json_and_quiet_only_notices_are_lines(lopt, fake, trained):
    fake("train", trained, events=(RUN, step(1), events.Notice(text="take note")))
    lines = lopt("train", "m", "d", "--json", "--quiet").err.splitlines()
    assert [json.loads(line) for line in lines] == [{"event": "Notice", "text": "take note", "ordinary": False}]


def test_other_commands_show_progress_as_text_with_json_too(lopt, fake, capsys):
    fake("quantize", events=(events.Notice(text="take note"),), error=errors.ModelError("broken"))
    result = lopt("quantize", "m", "s", "--json")
    assert "note: take note" in result.err
    assert result.json()["exit_code"] == 3
