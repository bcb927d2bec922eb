"""Whether files still hold what was written into them.

Whoever writes a large file notes its sha256; whoever reads it has it compared here when the file is first used. A file
is read once for that, in small pieces, just before it is read for its content: the system still has it then.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lopt_lite.errors import ModelError
from lopt_lite.events import OnEvent, Progress, ignore

#: How much of a file is in memory while it is hashed.
_BUFFER_BYTES = 1 << 20

#: What takes longer than this shows its progress, and shows it so often.
SILENT_S = 1.0

_MIB = 1 << 20

#: Files hashed by this process, as they were then, and their sha256. A file that was replaced is hashed again.
_hashed: dict[Path, tuple[tuple[int, ...], str]] = {}


class DamagedFileError(ModelError):
    """A file does not hold what was written into it, or is gone."""


class UnreadableFileError(DamagedFileError):
    """A file is there, and the system does not let us read it: what it holds is not known."""


def sha256_of(path: Path, *, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The sha256 of a file; hashed once per process, as long as nobody writes it.

    Parameters
    ----------
    on_bytes:
        Told after every piece how many bytes of how many are done; may raise to stop.

    Raises
    ------
    DamagedFileError
        The file is missing, or cannot be read (:class:`UnreadableFileError`).
    """
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            known = _hashed.get(path)
            if known is not None and known[0] == state:
                return known[1]
            digest, done, buffer = hashlib.sha256(), 0, memoryview(bytearray(_BUFFER_BYTES))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                on_bytes(done, status.st_size)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} is missing") from error
    except OSError as error:
        raise UnreadableFileError(f"cannot read {path}: {error.strerror or error}") from error
    _hashed[path] = (state, digest.hexdigest())
    return digest.hexdigest()


def check_file(path: Path, sha256: str, *, fix: str, on_event: OnEvent = ignore) -> None:
    """Compare a file with the ``sha256`` noted when it was written.

    Parameters
    ----------
    fix:
        What the user can do when it differs.
    on_event:
        Told how far a check is that takes long.

    Raises
    ------
    DamagedFileError
        The file is missing, cannot be read, or holds something else.
    """
    told_s = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= SILENT_S:
            told_s = time.monotonic()
            on_event(Progress(task=f"checking {path.name}", done=done // _MIB, total=total // _MIB, unit="MiB"))

    try:
        found = sha256_of(path, on_bytes=tell)
    except DamagedFileError as error:
        raise type(error)(error.found, expected=f"a file with sha256 {sha256}", fix=fix) from error
    if found != sha256:
        raise DamagedFileError(
            f"{path} is damaged: its sha256 is {found}", expected=f"{sha256}, as when it was written", fix=fix
        )


class CheckedFiles:
    """Files that are each checked when they are first used. May be used from several threads.

    Parameters
    ----------
    sha256:
        What each file should have. Files that are not listed are not checked.
    fix:
        What the user can do about a damaged file.
    repair:
        Makes a damaged or missing file anew, if anything can; raises what keeps it from that.
    on_event:
        Told how far a check is that takes long, unless it is made in a background thread.
    """

    def __init__(
        self,
        sha256: Mapping[Path, str],
        *,
        fix: str,
        repair: Callable[[Path], None] | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._sha256 = dict(sha256)
        self._fix, self._repair, self._on_event = fix, repair, on_event
        self._sound: set[Path] = set()
        self._locks = {path: threading.Lock() for path in sha256}
        self._owner = threading.current_thread()

    def check(self, path: Path) -> None:
        """See to it that ``path`` holds what it should, before it is read.

        Raises
        ------
        DamagedFileError
            It does not, and cannot be repaired.
        LoptError
            What went wrong with its repair.
        """
        if path in self._sound or path not in self._sha256:
            return
        with self._locks[path]:
            if path in self._sound:
                return
            try:
                self._compare(path)
            except DamagedFileError:
                if self._repair is None:
                    raise
                self._repair(path)
                self._compare(path)
            self._sound.add(path)

    def _compare(self, path: Path) -> None:
        on_event = self._on_event if threading.current_thread() is self._owner else ignore
        check_file(path, self._sha256[path], fix=self._fix, on_event=on_event)
