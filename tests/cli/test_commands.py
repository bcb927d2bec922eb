"""What each command prints of its outcome."""

from __future__ import annotations

import dataclasses

import pytest
from lopt_lite_cli.text import one_line, plain
from lopt_lite_cli.units import bytes_text, duration_text, loss_text

import lopt_lite
from lopt_lite import outcomes

STATUS = outcomes.StatusOutcome(
    run="runs/x",
    state="running",
    pid=42,
    model="m",
    data="d.jsonl",
    store_done=True,
    blocks=(
        outcomes.BlockStatus(block=0, objective="reconstruct", state="done", step=40, steps=40),
        outcomes.BlockStatus(block=1, objective="task", state="training", step=10, steps=40),
    ),
    next="train block 2",
    last_loss=1.25,
    loss_before=1.5,
    loss_after=None,
    seconds_left=200.0,
)

OUTCOMES = {
    "quantize": outcomes.QuantizeOutcome(
        store="s",
        already_done=False,
        shards=32,
        source_bytes=2**30,
        store_bytes=2**28,
        unquantized=("c_attn",),
        seconds=3.0,
    ),
    "evaluate": outcomes.EvaluateOutcome(
        run="runs/x",
        data="d.jsonl",
        examples=40,
        answer_tokens=4000,
        base_loss=1.5,
        base_perplexity=4.4817,
        tuned_loss=1.25,
        tuned_perplexity=3.4903,
    ),
    "generate": outcomes.GenerateOutcome(
        prompt="p", text="line one\nline two", tokens=6, tokens_per_s=10.0, finished=True
    ),
    "export": outcomes.ExportOutcome(out="out", format="merged", onto="original", bytes=2**28),
    "report": outcomes.ReportOutcome(
        run="runs/x",
        report="runs/x/report.html",
        picture="runs/x/loss.png",
        state="stopped",
        next="train block 2",
        seconds_left=200.0,
        loss_before=1.5,
        loss_after=None,
        final_train_loss=1.25,
        device_peak_bytes=2**30,
        predicted_bytes=2**31,
        notices=("The held-out loss rose.",),
    ),
}
ARGUMENTS = {
    "quantize": ("m", "s"),
    "evaluate": ("runs/x", "d.jsonl"),
    "generate": ("runs/x", "--prompt", "p"),
    "export": ("runs/x", "out"),
    "report": ("runs/x",),
}


def test_the_summary_of_a_run_tells_what_matters(lopt, fake, trained):
    fake("train", trained)
    assert lopt("train", "m", "d").out.splitlines() == [
        "done in 1m 15s: 320 examples, 80 steps",
        "held-out loss  1.5000 before, 1.2500 after (nats per answer token)",
        "peak memory    1.50 GiB",
        "adapter        runs/my demo/adapter",
        "try it         lopt-lite generate 'runs/my demo' --prompt \"...\"",
    ]


def test_without_validation_the_summary_says_how_to_get_it(lopt, fake, trained):
    fake("train", dataclasses.replace(trained, loss_before=None, loss_after=None))
    result = lopt("train", "m", "d")
    assert "--validation" in result.out
    assert "1.2000" in result.out


def test_a_finished_run_says_that_everything_is_done(lopt, fake, trained):
    fake("train", dataclasses.replace(trained, already_done=True))
    result = lopt("train", "m", "d")
    assert result.code == 0
    assert result.out.startswith("everything is done already: 320 examples")
    assert "1.2500 after" in result.out


@pytest.mark.parametrize("name", sorted(OUTCOMES))
def test_json_is_the_outcome(lopt, fake, name):
    fake(name, OUTCOMES[name])
    document = lopt(name, *ARGUMENTS[name], "--json").json()
    expected = OUTCOMES[name].to_json()
    assert document == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quantize", ["done in 3.0 s: 32 shards", "256 MiB, from 1.00 GiB", "c_attn"]),
        ("evaluate", ["40 examples, 4,000 answer tokens", "1.5000", "4.482", "1.2500", "3.49"]),
        ("generate", ["line one\nline two\n"]),
        ("export", ["merged, onto the original weights: out (256 MiB)"]),
        ("report", ["runs/x/report.html", "stopped; next: train block 2, about 3m 20s left", "1.2500", "loss rose"]),
    ],
)
def test_text_tells_the_outcome(lopt, fake, name, says):
    fake(name, OUTCOMES[name])
    result = lopt(name, *ARGUMENTS[name])
    assert result.code == 0
    for part in says:
        assert part in result.out


def test_status_tells_what_is_done_what_is_next_and_the_time_left(lopt, fake):
    calls = fake("status", STATUS)
    result = lopt("status", "runs/x")
    assert calls == ["runs/x"]
    for part in (
        "runs/x: running (process 42)",
        "1 of 2, reconstruct: done",
        "2 of 2, task: training, step 10/40",
        "next   train block 2",
        "about 3m 20s",
    ):
        assert part in result.out
    assert lopt("status", "runs/x", "--json").json()["blocks"][1]["step"] == 10


def test_a_report_without_a_step_says_that_there_are_no_curves(lopt, fake):
    calls = fake("report", dataclasses.replace(OUTCOMES["report"], picture=None, final_train_loss=None))
    assert "curves  none yet" in lopt("report", "runs/x").out
    assert calls == [lopt_lite.ReportSettings(run="runs/x")]


def test_an_answer_cannot_steer_the_terminal(lopt, fake):
    answer = outcomes.GenerateOutcome(
        prompt="p", text="a\x1b[31mb\r\x9bc\td\ne", tokens=1, tokens_per_s=1.0, finished=True
    )
    fake("generate", answer)
    assert lopt("generate", "runs/x", "--prompt", "p").out == "a\\x1b[31mb\\x0d\\x9bc\td\ne\n"
    assert lopt("generate", "runs/x", "--prompt", "p", "--json").json()["text"] == answer.text


def test_ordinary_text_is_left_alone():
    text = "Grüße, 你好, שלום 👍🏽 \t[bold]\n"
    assert plain(text) == text
    assert one_line("a\n b\x00") == "a b\\x00"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (2048, "2 KiB"), (2**20, "1 MiB"), (2**30 - 1, "1024 MiB"), (5 * 2**29, "2.50 GiB")],
)
def test_bytes_are_binary_units(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1m 00s"), (61, "1m 01s"), (3600, "1h 00m"), (7230, "2h 00m")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("loss", "text"), [(1.23456, "1.2346"), (0.00001234, "1.23e-05"), (0.0, "0.0000")])
def test_small_losses_keep_their_digits(loss, text):
    assert loss_text(loss) == text
