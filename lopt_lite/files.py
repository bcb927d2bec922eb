"""Durable files: every byte that must survive a crash is written here.

A durable file appears whole or not at all: it is written under a temporary name in its own directory, flushed,
fsynced, renamed, and the directory is fsynced. A crash leaves the old state or the new one, plus at most a stray
temporary (``.*.tmp``) that :func:`remove_stray_temporaries` deletes at the next start. A whole directory is copied in
the same way (:func:`copy_tree`), and the next attempt deletes what one that was cut off has left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lopt_lite.errors import DoesNotFitError, LoptError, RunDirectoryError, SettingsError

TEMPORARY_SUFFIX = ".tmp"
_DIRECTORY = f".by-libraries{TEMPORARY_SUFFIX}"

#: Room for the small files (journal, metrics, index, configs) that are written beside large ones.
BESIDE_BYTES = 16 << 20

_ANOTHER_DISK = "free some space, or put it on another disk with --output (or --store)"

#: Characters that some file systems refuse in names.
_UNSAFE_IN_NAMES = '/\\:*?"<>|'


def temporary_name(path: Path) -> Path:
    """The temporary name under which ``path`` is written, in the same directory."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def safe_name(text: str) -> str:
    """``text`` with characters that file systems refuse replaced, for use as one path component."""
    cleaned = "".join("-" if c in _UNSAFE_IN_NAMES or not c.isprintable() or c.isspace() else c for c in text)
    return cleaned.strip(".-") or "unnamed"


def explain_os_error(error: OSError, path: Path, doing: str) -> LoptError:
    """Translate an operating-system error met while ``doing`` something with ``path`` into one a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(existing_parent(path)).free:,}"
        return DoesNotFitError(
            f"the disk is full: cannot {doing} {path} (free: {free} bytes)",
            fix="free some space, then give the same command again; everything finished so far is kept",
        )
    if error.errno == errno.ENAMETOOLONG:
        # Found out here by Python 3.14; earlier ones raise it where they look whether the place exists.
        return SettingsError(f"a name is too long for the file system: {str(path)[:80]}...", fix="choose a shorter one")
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"cannot {doing} {path}: {reason}",
        fix="check that the directory exists, is writable and its disk is healthy, or choose another one "
        "(with --output, where there is that option)",
    )


def unreadable(error: OSError, path: Path, what: str, kind: type[LoptError], fix: str | None = None) -> LoptError:
    """An error of the given ``kind`` for a file, ``what`` it is, that the operating system does not let us read.

    Parameters
    ----------
    fix:
        What helps where it is not rights that are missing; None for what helps with any file.
    """
    if error.errno in (errno.EACCES, errno.EPERM):
        fix = "give yourself the right to read it (chmod, chown), or work as the user who has it"
    elif fix is not None:
        pass
    elif error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
        fix = "see where it went: a link to it may lead nowhere"
    else:
        fix = "check the disk that it is on, and that it is a file"
    return kind(f"cannot read {what} {path}: {error.strerror or error}", expected="a file that can be read", fix=fix)


def existing_parent(path: Path) -> Path:
    """The nearest ancestor of ``path`` (or itself) that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents durably; an existing directory is fine.

    Raises
    ------
    RunDirectoryError, DoesNotFitError
        The directory cannot be made or written.
    """
    missing = []
    probe = path
    while not probe.exists() and probe != probe.parent:
        missing.append(probe)
        probe = probe.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            fsync_directory(made.parent)
    except OSError as error:
        raise explain_os_error(error, path, "create the directory") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"the directory {path} is not writable", fix="choose another one, or change its rights")


def fsync_directory(path: Path) -> None:
    """Make renames and creations inside ``path`` durable (a no-op where directories cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for an atomic, durable replacement; the file appears when the block ends without an error.

    Raises
    ------
    DoesNotFitError
        The disk is full.
    RunDirectoryError
        Any other failure of the file system.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        _forget_temporary(temporary)
        raise explain_os_error(error, path, "write") from error
    except BaseException:
        _forget_temporary(temporary)
        raise


def _forget_temporary(path: Path) -> None:
    """Delete what will not be needed, where that works: the next start deletes it too, and another error is told of."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, atomically and durably."""
    with atomic_writer(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, atomically and durably."""
    # ASCII only: names of files may hold what is no text.
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, *, what: str, error: type[LoptError], fix: str | None = None) -> Any:
    """Parse a JSON file; failures become ``error`` naming ``what`` the file is, with the advice ``fix``."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as cause:
        raise unreadable(cause, path, what, error, fix) from cause
    except UnicodeDecodeError as cause:
        raise error(f"{what} {path} is not UTF-8 text (byte {cause.start})", fix=fix) from cause
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} {path} is not valid JSON: {cause}", fix=fix) from cause


def as_json(value: Any) -> Any:
    """``value`` with null for each number that is not finite, for which JSON has no word."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def open_lines(path: Path) -> BinaryIO:
    """Open ``path`` for :func:`append_line`, without a buffer: closing does not try again what could not be written."""
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise explain_os_error(error, path, "open") from error


def append_line(file: BinaryIO, value: Any, *, durable: bool = True) -> None:
    """Append ``value``, see :func:`as_json`, as one line to an open file; with ``durable`` it is fsynced on return."""
    path = Path(str(file.name))
    left = (json.dumps(as_json(value), allow_nan=False) + "\n").encode()
    try:
        while left:
            left = left[file.write(left) :]
        if durable:
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path, "append to") from error


def truncate(path: Path, size_bytes: int) -> None:
    """Cut ``path`` to ``size_bytes`` and make that durable (used to drop a line that a crash cut short)."""
    try:
        with open(path, "r+b") as file:
            file.truncate(size_bytes)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path, "repair") from error


@contextlib.contextmanager
def temporary_directory(within: Path) -> Iterator[Path]:
    """A directory in ``within`` for what a library writes, until the context is left.

    It is there and not where the system keeps temporary files, which may be a disk of its own, and a full one. Only one
    at a time can be in a directory; what an attempt that was cut off has left is deleted first.
    """
    directory = within / _DIRECTORY
    remove_tree(directory)
    try:
        directory.mkdir()
        yield directory
    except BaseException as error:
        with contextlib.suppress(LoptError):  # the next start deletes it too, and another error is told of
            remove_tree(directory)
        if isinstance(error, OSError):
            raise explain_os_error(error, within, "write to") from error
        raise
    remove_tree(directory)


def move_file(source: Path, target: Path) -> None:
    """Give a finished file its place on the same disk, atomically and durably."""
    try:
        with open(source, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(source, target)
        fsync_directory(target.parent)
    except OSError as error:
        raise explain_os_error(error, target, "write") from error


def copy_file(source: Path, target: Path) -> None:
    """Copy one regular file atomically and durably; the content only, not the rights."""
    try:
        with open(source, "rb") as reader, atomic_writer(target) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    except OSError as error:
        raise explain_os_error(error, source, "copy") from error


def copy_tree(source: Path, target: Path, *, what: str) -> None:
    """Copy a directory and all it holds durably; the content only, not the rights.

    ``target`` appears whole: it is written beside its place under a temporary name, and renamed. An empty directory
    that is there already stays and is filled, from a temporary directory in it: it may be what cannot be renamed over,
    a mounted disk or the current directory. What an attempt that was cut off has left is deleted first.

    Parameters
    ----------
    what:
        What is copied, for the message when the disk has no room for it.

    Raises
    ------
    RunDirectoryError
        ``target`` is something else than an empty directory, lies within ``source``, or cannot be written.
    DoesNotFitError
        The disk is full, or would be.
    """
    place = Path(os.path.realpath(target))
    fills = place.is_dir()
    temporary = temporary_name(place / place.name if fills else place)
    try:
        names = sorted(path.name for path in source.iterdir())
        found = {path.name for path in place.iterdir()} if fills else set()
    except OSError as error:
        raise explain_os_error(error, source, "copy") from error
    was_cut_off = temporary.name in found and found <= {temporary.name, *names}
    if target.exists() and not (fills and (not found or was_cut_off)):
        raise RunDirectoryError(f"{target} exists and is not an empty directory", fix="name a new directory")
    if place.is_relative_to(source.resolve()):
        raise RunDirectoryError(f"{target} lies in {source}, which is to be copied", fix="name a directory outside it")
    moved = [place / name for name in names] if fills else []
    make_directory(place if fills else place.parent)
    _forget_copy(temporary, moved)
    fix = "free some space, or name a directory on another disk"
    require_free_space(place, directory_bytes(source), what=what, fix=fix)
    try:
        _copy_entries(source, temporary)
        if fills:
            for path in moved:
                os.replace(temporary / path.name, path)
            fsync_directory(place)
            temporary.rmdir()
        else:
            os.replace(temporary, place)
        fsync_directory(place if fills else place.parent)
    except OSError as error:
        with contextlib.suppress(LoptError):
            _forget_copy(temporary, moved)
        raise explain_os_error(error, target, "write") from error
    except BaseException:
        with contextlib.suppress(LoptError):
            _forget_copy(temporary, moved)
        raise


def _copy_entries(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_entries(path, target / path.name)
        else:
            copy_file(path, target / path.name)
    fsync_directory(target)


def _forget_copy(temporary: Path, moved: Iterable[Path]) -> None:
    """Delete a copy that is not whole. Its directory goes last: with it, what was moved out of it is known as ours."""
    if temporary.is_dir():
        for path in moved:
            remove_tree(path)
        remove_tree(temporary)


def remove_file(path: Path) -> None:
    """Delete ``path`` if it is there, durably."""
    try:
        path.unlink(missing_ok=True)
        if path.parent.exists():
            fsync_directory(path.parent)
    except OSError as error:
        raise explain_os_error(error, path, "delete") from error


def remove_tree(path: Path) -> None:
    """Delete a directory and all it holds, if it is there."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        raise explain_os_error(error, path, "delete") from error


def remove_stray_temporaries(directory: Path) -> int:
    """Delete what was left anywhere below ``directory`` where writing was cut off; returns how many.

    That is temporary files of :func:`atomic_writer`, and directories of :func:`temporary_directory`.
    """
    count = 0
    for stray in list(directory.rglob(f".*{TEMPORARY_SUFFIX}")):
        if stray.is_symlink():
            continue
        if stray.is_file():
            remove_file(stray)
            count += 1
        elif stray.is_dir() and stray.name == _DIRECTORY:
            remove_tree(stray)
            count += 1
    return count


def directory_bytes(path: Path, *, without: Path | None = None) -> int:
    """Bytes of all files below ``path`` (0 when it does not exist), but for those below ``without``.

    What vanishes meanwhile is not counted.
    """
    apart, total = None if without is None else without.absolute(), 0
    for directory, _, names in os.walk(path.absolute()):
        if apart is not None and Path(directory).is_relative_to(apart):
            continue
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = Path(directory, name).stat()
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def require_free_space(path: Path, needed_bytes: int, *, what: str, fix: str = _ANOTHER_DISK) -> None:
    """Refuse ``what``, work that the disk below ``path`` cannot hold, with the advice ``fix``.

    Raises
    ------
    DoesNotFitError
        Fewer than ``needed_bytes`` are free.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed_bytes:
        raise DoesNotFitError(
            f"{what} needs {needed_bytes:,} bytes on the disk of {path}, and {free:,} are free",
            fix=fix,
        )
