"""One process at a time in a directory, by the operating system's lock, which dies with its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lopt_lite.errors import RunDirectoryError
from lopt_lite.events import Notice, OnEvent

LOCK_NAME = "lock"
_PID_NAME = "lock.pid"


def holder_pid(directory: Path) -> int | None:
    """Process id of the process that holds the lock of ``directory`` now, or None."""
    path = directory / LOCK_NAME
    if not path.exists():
        return None
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _recorded_pid(directory)
    except OSError:
        return None
    lock.release()
    return None


def _recorded_pid(directory: Path) -> int | None:
    try:
        return int((directory / _PID_NAME).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(directory: Path, *, what: str, wait: bool = False, on_event: OnEvent | None = None) -> Iterator[None]:
    """Hold the lock of ``directory``.

    Parameters
    ----------
    what:
        What the directory is, for the message.
    wait:
        Wait for another holder (a shared store being built) instead of refusing.

    Raises
    ------
    RunDirectoryError
        Another process holds it, or the lock file cannot be made.
    """
    lock = FileLock(str(directory / LOCK_NAME))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = _recorded_pid(directory)
        if not wait:
            raise RunDirectoryError(
                f"{what} {directory} is in use by another process (process id {pid or 'unknown'})",
                fix="wait for it to end, stop it, or choose another directory",
            ) from None
        if on_event is not None:
            on_event(Notice(text=f"waiting for process {pid or 'unknown'}, which is working in {directory}"))
        lock.acquire()
    except OSError as error:
        raise RunDirectoryError(f"cannot lock {directory}: {error.strerror or error}") from error
    try:
        (directory / _PID_NAME).write_text(str(os.getpid()))
        yield
    finally:
        (directory / _PID_NAME).unlink(missing_ok=True)
        lock.release()
