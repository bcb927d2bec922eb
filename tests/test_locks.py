"""One process at a time in a directory; a lock never outlives its process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from lopt_lite.errors import RunDirectoryError, StoppedError
from lopt_lite.events import Notice
from lopt_lite.locks import LOCK_NAME, holder_pid, locked

_HOLD = """
import sys, pathlib
from lopt_lite.locks import locked
with locked(pathlib.Path(sys.argv[1]), what="the run directory"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def _another_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", _HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_at_once_and_told_which_one_is_there(tmp_path):
    with _another_process(tmp_path) as other:
        started = time.monotonic()
        with pytest.raises(RunDirectoryError) as caught, locked(tmp_path, what="the run directory"):
            pytest.fail("two holders")
        assert time.monotonic() - started < 1.0
        assert f"the run directory {tmp_path} is in use" in caught.value.found
        assert f"(process id {other.pid})" in caught.value.found
        assert caught.value.fix
        assert holder_pid(tmp_path) == other.pid


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with _another_process(tmp_path) as other:
        other.kill()
        other.wait()
        assert (tmp_path / "lock.pid").read_text() == str(other.pid), "what the killed process left behind"
        assert holder_pid(tmp_path) is None
        with locked(tmp_path, what="the run directory"):
            assert (tmp_path / "lock.pid").read_text() == str(os.getpid())
    assert not (tmp_path / "lock.pid").exists()


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path, what="the store"):
        raise ValueError
    with locked(tmp_path, what="the store"):
        pass


def test_waiting_takes_the_lock_when_the_other_process_ends_and_says_so_first(tmp_path):
    events = []
    with _another_process(tmp_path) as other:
        assert other.stdin is not None
        timer = threading.Timer(0.5, other.stdin.close)
        timer.start()
        with locked(tmp_path, what="the store", wait=True, on_event=events.append):
            assert holder_pid(tmp_path) == os.getpid()
        timer.join()
        assert events == [Notice(text=f"waiting for process {other.pid}, which is working in {tmp_path}")]


def test_waiting_can_be_stopped(tmp_path):
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise StoppedError("stopped by SIGINT")

    with (
        _another_process(tmp_path) as other,
        pytest.raises(StoppedError),
        locked(tmp_path, what="the store", wait=True, check=check),
    ):
        pytest.fail(f"{other.pid} holds the lock")


def test_looking_who_holds_the_lock_does_not_keep_a_run_from_starting(tmp_path):
    """``status`` takes the lock for a moment to see whether it is free."""
    taken, release = threading.Event(), threading.Event()

    def look() -> None:
        with FileLock(str(tmp_path / LOCK_NAME)):
            taken.set()
            release.wait(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    taken.wait()
    with locked(tmp_path, what="the run directory"):
        pass
    thread.join()


def test_looking_makes_no_lock_file_and_leaves_no_lock(tmp_path):
    assert holder_pid(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, what="the run directory"):
        pass
    assert holder_pid(tmp_path) is None
    with locked(tmp_path, what="the run directory"):
        pass


def test_a_holder_that_has_not_written_its_number_yet_is_unknown(tmp_path):
    with _another_process(tmp_path):
        (tmp_path / "lock.pid").write_text("")
        with pytest.raises(RunDirectoryError, match="process id unknown"), locked(tmp_path, what="the run directory"):
            pytest.fail("two holders")


def test_a_lock_file_that_cannot_be_made_is_an_error_of_the_run_directory(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(RunDirectoryError, match="cannot lock"), locked(tmp_path, what="the run directory"):
        pytest.fail("locked a directory")


def test_a_second_start_of_a_run_is_turned_away_before_anything_large_is_imported(tmp_path):
    """Importing torch takes longer than a refusal may."""
    code = (
        "import sys\n"
        "from lopt_lite_cli.main import main\n"
        f"code = main(['train', 'some/model', 'd.jsonl', '--output', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    with locked(tmp_path, what="the run directory"):
        started = time.monotonic()
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        took_s = time.monotonic() - started
    assert second.returncode == 5, second.stderr
    assert f"process id {os.getpid()}" in second.stderr
    assert took_s < 3, "well under a second, where the machine is not busy"


def test_what_cannot_be_locked_is_told_with_what_helps(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(RunDirectoryError, match="cannot lock") as caught, locked(tmp_path, what="the run directory"):
        pytest.fail("locked")
    assert str(tmp_path / LOCK_NAME) in caught.value.fix
