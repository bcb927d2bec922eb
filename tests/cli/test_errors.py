"""Every error becomes a message, an exit code and, with --json, one document."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lopt_lite_cli.main import main

from lopt_lite import errors, outcomes

LOPT_ERRORS = [
    (errors.SettingsError, 2),
    (errors.ModelError, 3),
    (errors.DataError, 3),
    (errors.DoesNotFitError, 4),
    (errors.RunDirectoryError, 5),
    (errors.DivergedError, 6),
    (errors.StoppedError, 75),
]


@pytest.mark.parametrize(("kind", "code"), LOPT_ERRORS)
def test_errors_of_the_package_keep_their_exit_code_and_their_three_parts(lopt, fake, kind, code):
    fake("train", error=kind("this was found", expected="that", fix="do so"))
    result = lopt("train", "m", "d")
    assert result.code == code
    if kind is errors.StoppedError:  # asked for, so nothing to fix
        assert result.err == "this was found\n  expected: that\n  to go on: do so\n"
    else:
        assert result.err == "error: this was found\n  expected: that\n  to fix: do so\n"
    assert result.out == ""


@pytest.mark.parametrize(("kind", "code"), LOPT_ERRORS)
def test_with_json_the_error_is_the_one_document(lopt, fake, kind, code):
    fake("train", error=kind("this was found", fix="do so"))
    result = lopt("train", "m", "d", "--json")
    assert result.code == code
    assert result.json() == {
        "error": kind.__name__,
        "exit_code": code,
        "found": "this was found",
        "expected": None,
        "fix": "do so",
    }
    assert result.err.removeprefix("error: ").startswith("this was found\n")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 75, "same command again"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 4, "--batch-size"),
        (RuntimeError("CUDA error: out of memory"), 4, "--batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 4, "--batch-size"),
        (RuntimeError("Invalid buffer size: 12.00 GiB"), 4, "--batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), 4, "--batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4, "disk is full: cannot write f"),
        (RuntimeError("odd\nsecond line"), 1, "unexpected RuntimeError: odd\n"),
        (ValueError(), 1, "(no message)"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "please report"),
    ],
)
def test_other_errors_have_their_row_in_the_table(lopt, fake, error, code, says):
    fake("train", error=error)
    result = lopt("train", "m", "d")
    assert result.code == code
    assert says in result.err
    assert "Traceback" not in result.err
    assert "second line" not in result.err


def test_torch_out_of_memory_is_exit_code_4(lopt, fake):
    import torch

    fake("train", error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert lopt("train", "m", "d").code == 4


def test_debugging_shows_the_traceback(lopt, fake, monkeypatch):
    monkeypatch.setenv("LOPT_LITE_DEBUG", "1")
    fake("train", error=RuntimeError("odd"))
    result = lopt("train", "m", "d")
    assert result.code == 1
    assert "Traceback" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["train", "m", "d", "--nonsense"],
        ["train", "m", "d", "e"],
        ["train", "m", "d", "--lora-r", "many"],
        ["train", "m", "d", "--lora-r"],
        ["train", "m", "d", "--device", "tpu"],
        ["train", "m", "d", "--blocks", "0"],
        ["train", "m", "d", "--deadline", "25:00"],
    ],
)
def test_usage_errors_are_exit_code_2_and_one_json_document(lopt, fake, arguments):
    calls = fake("train")
    result = lopt(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    with_json = lopt(*arguments[:1], "--json", *arguments[1:])
    assert with_json.code == 2
    assert with_json.json()["exit_code"] == 2
    assert calls == []


def test_no_command_shows_the_help_and_is_a_usage_error(lopt):
    result = lopt()
    assert result.code == 2
    assert "train" in result.out + result.err


def test_version(lopt):
    import lopt_lite

    result = lopt("--version")
    assert (result.code, result.out) == (0, f"lopt-lite {lopt_lite.__version__}\n")


def test_escape_sequences_in_an_error_are_shown_not_obeyed(lopt, fake):
    fake("train", error=errors.DataError("line 7 holds \x1b]0;title\x07 and \u202e", fix="\x9b2J"))
    result = lopt("train", "m", "d")
    assert not set("\x1b\x07\u202e\x9b") & set(result.err)
    assert r"\x1b]0;title\x07" in result.err


_STATUS_IN_A_PROCESS = """
import sys, lopt_lite
from lopt_lite import outcomes
lopt_lite.__dict__["status"] = lambda run: outcomes.StatusOutcome(**{status!r})
from lopt_lite_cli.main import run
sys.argv = ["lopt-lite", "status", "r", *sys.argv[1:]]
run()
"""


def _status_process(*arguments: str, stdout: int) -> tuple[int, str]:
    status = outcomes.StatusOutcome(
        run="r" * 100_000,
        state="done",
        pid=None,
        model="m",
        data="d",
        store_done=True,
        blocks=(),
        next="",
        last_loss=None,
        loss_before=None,
        loss_after=None,
        seconds_left=None,
    )
    done = subprocess.run(
        [sys.executable, "-c", _STATUS_IN_A_PROCESS.format(status=status.to_json()), *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    assert _status_process(*arguments, stdout=writer) == (0, "")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_full_disk_behind_a_redirection_is_exit_code_4(arguments):
    full = os.open("/dev/full", os.O_WRONLY)
    code, err = _status_process(*arguments, stdout=full)
    os.close(full)
    assert code == 4
    assert err.startswith("error: the disk is full")
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_json_has_no_nan(lopt, fake):
    fake(
        "evaluate",
        outcomes.EvaluateOutcome(
            run="r\x9b",
            data="dé",
            examples=1,
            answer_tokens=2,
            base_loss=800.0,
            base_perplexity=float("inf"),
            tuned_loss=float("nan"),
            tuned_perplexity=2.0,
        ),
    )
    result = lopt("evaluate", "r", "d", "--json")
    document = json.loads(result.out, parse_constant=lambda name: pytest.fail(name))
    assert (document["base_perplexity"], document["tuned_loss"], document["data"]) == (None, None, "dé")
    assert result.out.isascii()


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_places_where_nobody_looks(tmp_path, closed):
    """And no number for the next file: libraries would write their warnings into it."""
    command = f"{shlex.quote(sys.executable)} -c 'from lopt_lite_cli.main import run; run()' status nowhere --json"
    done = subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    if closed == "2>&-":
        assert json.loads(done.stdout)["error"] == "RunDirectoryError"
    else:
        assert done.stdout == ""


def test_without_a_command_the_help_goes_to_standard_error(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Usage: lopt-lite" in said.err
