"""One process at a time in a directory, by the operating system's lock, which dies with its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lopt_lite import files
from lopt_lite.errors import RunDirectoryError
from lopt_lite.events import Notice, OnEvent

LOCK_NAME = "lock"
_PID_NAME = "lock.pid"

#: :func:`holder_pid` holds the lock for a moment itself; this long an owner-to-be waits before it gives up.
_PATIENCE_S = 0.3
_POLL_S = 0.02


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


def _record_pid(directory: Path) -> None:
    path = directory / _PID_NAME
    try:
        path.write_text(str(os.getpid()))
    except OSError as error:
        raise files.explain_os_error(error, path, "write") from error


def _recorded_pid(directory: Path) -> int | None:
    try:
        return int((directory / _PID_NAME).read_text())
    except (OSError, ValueError):
        return None


def refusal(directory: Path, what: str, pid: int | None) -> RunDirectoryError:
    """The error for ``directory``, which is ``what`` and held by process ``pid``."""
    return RunDirectoryError(
        f"{what} {directory} is in use by another process (process id {pid or 'unknown'})",
        fix="wait for it to end, stop it, or choose another directory",
    )


@contextlib.contextmanager
def locked(
    directory: Path,
    *,
    what: str,
    wait: bool = False,
    check: Callable[[], None] = lambda: None,
    on_event: OnEvent | None = None,
) -> Iterator[None]:
    """Hold the lock of ``directory``.

    Parameters
    ----------
    what:
        What the directory is, for the message.
    wait:
        Wait for another holder (a shared store being built) instead of refusing.
    check:
        Called now and then while waiting; may raise to stop.

    Raises
    ------
    RunDirectoryError
        Another process holds it, or the lock file cannot be made.
    """
    lock = FileLock(str(directory / LOCK_NAME))
    try:
        lock.acquire(timeout=_PATIENCE_S, poll_interval=_POLL_S)
    except Timeout:
        pid = _recorded_pid(directory)
        if not wait:
            raise refusal(directory, what, pid) from None
        if on_event is not None:
            on_event(Notice(text=f"waiting for process {pid or 'unknown'}, which is working in {directory}"))
        while not lock.is_locked:
            check()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=_PATIENCE_S, poll_interval=_POLL_S)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot lock {directory}: {error.strerror or error}",
            expected=f"a directory in which the file {LOCK_NAME} can be made and opened",
            fix=f"delete {directory / LOCK_NAME} if it is no plain file, or name another directory",
        ) from error
    try:
        _record_pid(directory)
        yield
    finally:
        # It says nothing once the lock is free; a disk that fails now must not hide what ended the work.
        with contextlib.suppress(OSError):
            (directory / _PID_NAME).unlink(missing_ok=True)
        lock.release()
