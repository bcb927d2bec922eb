"""Keeping a process at the memory that it uses: freed memory stays for reuse until there is too much of it.

glibc's heap keeps freed blocks, where activations of ever new sizes leave holes: a process that needs 0.8 GiB at any
time grew to 1.4 GiB in ``benchmarks/depth.py``. Giving every freed block back at once keeps it small, but each is then
paid for in page faults when it is taken again: two fifths of the time of a run. So blocks stay in the heap, and a
thread looks at the process's size every few milliseconds: above a line, it has the C library give back the pages of all
holes (``malloc_trim``). A step of SmolLM2 does that once or never, and as page faults limit how fast a process grows,
it passes the line by a few MiB. Where other processes want the same core, the thread may come late: whoever computes
looks as well, between one layer and the next (:func:`look`).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil

from lopt_lite import host_memory

_INTERVAL_S = 0.003
#: Giving back takes a fifth of the process's time at most, however much it has that is not ours to give back. Of its
#: time, not the clock's: while others have the core, it does not grow either, and would rest too long.
_PAUSES = 4
#: Above the line, what is given back must have been worth it, or the process must grow by more before the next try.
_STEP_BYTES, _LARGEST_STEP_BYTES = 4 << 20, 8 << 20
#: The line is a little below what the process may have: it passes it by what it takes in an interval.
_SHARE = 0.97

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: The largest that glibc accepts: blocks up to 32 MiB come from the heap, whose end is never given back by itself.
_FROM_HEAP_BYTES, _KEEP_BYTES = 32 << 20, (1 << 31) - 1
_STATM = Path("/proc/self/statm")


class FreedMemory:
    """Watches this process, from when it is first told what it may have until the context is left.

    Without glibc's allocator, or with ``watches=False``, it does nothing. What it sets in the allocator stays.

    Attributes
    ----------
    watches:
        Whether it does anything.
    given_back:
        How many times holes were given back.
    """

    #: The one that :func:`look` asks.
    _at_work: ClassVar[FreedMemory | None] = None

    def __init__(self, *, watches: bool = True) -> None:
        self.watches = watches and host_memory.has_glibc()
        self._line_bytes: float = float("inf")
        self.given_back = 0
        self._next_bytes, self._step_bytes = 0.0, _STEP_BYTES
        self._rests_until_s = 0.0
        self._size: ResidentSize | None = None
        self._looking = threading.Lock()
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def keep_below(self, most_bytes: int) -> None:
        """The process may have ``most_bytes``, or what it was told before if that is less."""
        self._line_bytes = min(self._line_bytes, _SHARE * most_bytes)
        if self.watches and self._thread is None:
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
            self._size = ResidentSize()
            FreedMemory._at_work = self
            self._thread = threading.Thread(target=self._watch, name="freed memory", daemon=True)
            self._thread.start()

    def __enter__(self) -> FreedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._left.set()
            self._thread.join()
            self._thread = None
            if FreedMemory._at_work is self:
                FreedMemory._at_work = None
            with self._looking:
                assert self._size is not None
                self._size.close()
                self._size = None

    def look(self) -> None:
        """Give holes back if the process is above the line. Microseconds where it is not, or another thread looks."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            if self._size is not None and time.process_time() >= self._rests_until_s:
                self._keep_below_line(self._size)
        finally:
            self._looking.release()

    def _keep_below_line(self, size: ResidentSize) -> None:
        now_bytes = size.read()
        if now_bytes <= self._line_bytes:
            self._next_bytes, self._step_bytes = 0.0, _STEP_BYTES
        elif now_bytes > self._next_bytes:
            began_s = time.thread_time()
            host_memory.trim()
            self._rests_until_s = time.process_time() + _PAUSES * (time.thread_time() - began_s)
            self.given_back += 1
            left_bytes = size.read()
            was_worth_it = now_bytes - left_bytes >= _STEP_BYTES
            self._step_bytes = _STEP_BYTES if was_worth_it else min(2 * self._step_bytes, _LARGEST_STEP_BYTES)
            self._next_bytes = left_bytes + self._step_bytes

    def _watch(self) -> None:
        while not self._left.wait(_INTERVAL_S):
            self.look()


def look() -> None:
    """Have whoever keeps this process at what it may have look at its size now; nothing where nobody does."""
    if FreedMemory._at_work is not None:
        FreedMemory._at_work.look()


class ResidentSize:
    """This process's resident size, read in microseconds where Linux offers it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._file = os.open(_STATM, os.O_RDONLY) if _STATM.exists() else None
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def read(self) -> int:
        """Bytes. proc(5): the second number of statm is the resident set size in pages."""
        if self._file is None:
            return int(self._process.memory_info().rss)
        return int(os.pread(self._file, 128, 0).split()[1]) * self._page_bytes

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
