"""The calls by which a process changes files: told of one by one, ended at one of them, or made to fail.

Everything below a directory is seen, whoever writes it: nothing has to be registered, so a new write is covered by
itself. Calls are named by what they do, the path, and how often that has happened before, so that the same moment is
found again in another process.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a full disk still allows.
_FREEING = ("unlink", "rmdir", "rmtree", "fsync")


@dataclass(frozen=True)
class Operation:
    """One call: ``name`` of what it does, ``path`` below the watched directory, ``times`` that happened before."""

    name: str
    path: str
    times: int

    @property
    def kind(self) -> str:
        """What it has in common with others at the same place of the program: numbers in the path do not matter."""
        return f"{self.name} {re.sub(r'[0-9]+', '#', self.path)}"


#: Called around a call; may raise instead of letting it happen.
Around = Callable[[Operation, Callable[[], Any]], Any]


def watch(root: Path, around: Around) -> None:
    """From now on give every call of this process that changes something below ``root`` to ``around``."""
    base = os.path.realpath(root)
    seen: Counter[tuple[str, str]] = Counter()

    def below(path: Any) -> str | None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        full = os.path.realpath(os.fsdecode(path))
        return os.path.relpath(full, base) if full == base or full.startswith(base + os.sep) else None

    def perform(name: str, path: Any, call: Callable[[], Any], *, partly: Callable[[], Any] | None = None) -> Any:
        place = below(path)
        if place is None or Path(place).name == "lock":
            return call()
        operation = Operation(name, place, seen[name, place])
        seen[name, place] += 1
        try:
            return around(operation, call)
        except OSError as error:
            if error.errno == errno.ENOSPC and partly is not None:
                # What still fits is written.
                partly()
            raise

    def wrap(module: Any, name: str, path_of: Callable[..., Any]) -> None:
        original = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            path = None if kwargs.get("dir_fd") is not None else path_of(*args, **kwargs)
            return perform(name, path, lambda: original(*args, **kwargs))

        setattr(module, name, wrapper)

    wrap(os, "fsync", lambda file: Path(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").readlink())
    wrap(os, "replace", lambda source, target, **kwargs: target)
    for name in ("unlink", "mkdir", "rmdir"):
        wrap(os, name, lambda path, *args, **kwargs: path)
    wrap(shutil, "rmtree", lambda path, *args, **kwargs: path)

    original_open, original_temporary = io.open, tempfile.TemporaryFile

    def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+") or below(file) is None:
            return original_open(file, mode, *args, **kwargs)
        opened = perform("open", file, lambda: original_open(file, mode, *args, **kwargs))
        return _WatchedFile(opened, file, perform)

    def watched_temporary(*args: Any, **kwargs: Any) -> Any:
        path = Path(kwargs["dir"], "scratch") if kwargs.get("dir") is not None else None
        opened = perform("open", path, lambda: original_temporary(*args, **kwargs))
        return opened if path is None else _WatchedFile(opened, path, perform)

    builtins.open = io.open = watched_open  # type: ignore[assignment]
    tempfile.TemporaryFile = watched_temporary  # type: ignore[assignment,misc]


class _WatchedFile:
    """A file whose writes are told of."""

    def __init__(self, file: Any, path: Any, perform: Callable[..., Any]) -> None:
        self._file, self._path, self._perform = file, path, perform

    def write(self, data: Any) -> Any:
        half = data[: len(data) // 2]
        return self._perform("write", self._path, lambda: self._file.write(data), partly=lambda: self._file.write(half))

    def truncate(self, *args: Any) -> Any:
        return self._perform("truncate", self._path, lambda: self._file.truncate(*args))

    def __enter__(self) -> _WatchedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: Any) -> Any:
        return self._file.__exit__(*exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def record(into: Path) -> Around:
    """Write each operation as a line of ``into``."""
    # Not by ``open``: that is watched.
    lines = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def around(operation: Operation, call: Callable[[], Any]) -> Any:
        os.write(lines, f"{operation.name}\t{operation.path}\t{operation.times}\n".encode())
        return call()

    return around


def recorded(path: Path) -> list[Operation]:
    """What :func:`record` wrote."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [Operation(name, place, int(times)) for name, place, times in rows]


def kill_at(chosen: Operation, *, after: bool) -> Around:
    """End this process (SIGKILL) just before, or just after, one operation."""

    def around(operation: Operation, call: Callable[[], Any]) -> Any:
        if operation == chosen and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if operation == chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return around


def fail_at(chosen: Operation, number: int) -> Around:
    """Let one operation fail with the error ``number``, and from then on all others that would fail as well."""
    failing = False

    def around(operation: Operation, call: Callable[[], Any]) -> Any:
        nonlocal failing
        lasts = number in (errno.ENOSPC, errno.EROFS) and not (number == errno.ENOSPC and operation.name in _FREEING)
        if operation == chosen or (failing and lasts):
            failing = True
            raise OSError(number, os.strerror(number), operation.path)
        return call()

    return around
