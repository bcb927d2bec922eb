"""Freed memory is kept for reuse, up to a line. Tried in processes of their own, as the allocator keeps settings."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import psutil
import pytest

from lopt_lite import freed_memory, host_memory
from lopt_lite.freed_memory import FreedMemory
from lopt_lite.host_memory import has_glibc

#: Frees 128 MiB in holes, and takes 128 MiB in blocks that do not fit into them. Prints by how many MiB the process
#: has grown at most, and how many times holes were given back.
_PROGRAM = """
import ctypes, sys
from lopt_lite import host_memory
from lopt_lite.freed_memory import FreedMemory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def take(size_mib):
    block = libc.malloc(size_mib << 20)
    libc.memset(block, 1, size_mib << 20)
    libc.malloc(200_000)  # stays, so that the block does not join its neighbours when it is freed
    return block

before = host_memory.rss_bytes()
with FreedMemory(watches=sys.argv[2] == "watches") as freed:
    freed.keep_below(before + (int(sys.argv[1]) << 20))
    host_memory.forget_peak()
    for block in [take(4) for _ in range(32)]:
        libc.free(block)
    for _ in range(8):
        take(16)
    print((host_memory.peak_rss_bytes() - before) >> 20, freed.given_back)
"""


def _grown(most_mib: int, *, watches: bool = True) -> tuple[int, int]:
    arguments = [str(most_mib), "watches" if watches else "does not"]
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=True)
    grown_mib, given_back = done.stdout.split()
    return int(grown_mib), int(given_back)


needs_glibc = pytest.mark.skipif(not has_glibc(), reason="the allocator is not glibc's")


@needs_glibc
def test_holes_are_given_back_above_the_line_and_only_there():
    grown_mib, given_back = _grown(2000)
    assert given_back == 0
    assert grown_mib > 240
    grown_mib, given_back = _grown(160)
    assert given_back >= 1
    assert grown_mib < 200


def test_where_it_does_not_watch_nothing_is_given_back():
    assert _grown(100, watches=False)[1] == 0


def _watching_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "freed memory"]


@needs_glibc
def test_it_watches_from_the_first_line_drawn_until_the_context_is_left():
    with FreedMemory() as freed:
        assert not _watching_threads()
        freed.keep_below(1 << 50)
        freed.keep_below(1 << 51)
        assert _watching_threads() == ["freed memory"]
    assert not _watching_threads()
    assert freed.given_back == 0


@needs_glibc
def test_a_line_that_cannot_be_kept_is_not_fought_for_at_every_look(monkeypatch: pytest.MonkeyPatch):
    looks = []
    monkeypatch.setattr(host_memory, "trim", lambda: None)
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: looks.append(1) or 1 << 30)
    with FreedMemory() as freed:
        freed.keep_below(1 << 20)
        while len(looks) < 20:
            time.sleep(0.001)
    assert freed.given_back == 1


@needs_glibc
def test_giving_back_slowly_leaves_most_of_the_time_to_others(monkeypatch: pytest.MonkeyPatch):
    """Of the time that the process gets: on a busy machine the clock goes on without it."""
    began: list[float] = []
    sizes = iter(range(1 << 30, 1 << 40, 64 << 20))

    def slowly() -> None:
        began.append(time.process_time())
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    monkeypatch.setattr(host_memory, "trim", slowly)
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: next(sizes))
    with FreedMemory() as freed:
        freed.keep_below(1 << 20)
        while len(began) < 4:
            sum(range(1000))
    assert min(later - earlier for earlier, later in itertools.pairwise(began)) > 0.09


@needs_glibc
def test_a_line_is_only_ever_lowered(monkeypatch: pytest.MonkeyPatch):
    looks: list[int] = []
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: looks.append(1) or 1 << 30)
    monkeypatch.setattr(host_memory, "trim", lambda: None)
    with FreedMemory() as freed:
        for higher, lower, expected in ((1 << 32, 1 << 31, 0), (1 << 33, 1 << 29, 1)):
            freed.keep_below(lower)
            freed.keep_below(higher)
            looks.clear()
            while len(looks) < 5:
                time.sleep(0.001)
            assert freed.given_back == expected


def test_the_resident_size_is_that_which_psutil_reads():
    size = freed_memory.ResidentSize()
    try:
        assert size.read() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    finally:
        size.close()


@needs_glibc
def test_whoever_computes_can_look_where_the_thread_comes_late(monkeypatch: pytest.MonkeyPatch):
    sizes = iter(range(1 << 30, 1 << 40, 64 << 20))
    monkeypatch.setattr(freed_memory, "_INTERVAL_S", 3600)
    monkeypatch.setattr(freed_memory, "_PAUSES", 0)
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: next(sizes))
    monkeypatch.setattr(host_memory, "trim", lambda: None)
    freed_memory.look()  # nobody keeps anything: no matter
    with FreedMemory() as freed:
        freed_memory.look()
        freed.keep_below(1 << 20)
        for looks in range(1, 4):
            freed_memory.look()
            assert freed.given_back == looks
    freed_memory.look()
    assert freed.given_back == 3
