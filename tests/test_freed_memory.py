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

#: Allocates and frees 8 MiB blocks with a small one that stays after each, so that the freed ones are holes; prints by
#: how many MiB the process has grown at most, and whether holes were given back.
_PROGRAM = """
import sys, time
import torch
from lopt_lite import host_memory
from lopt_lite.freed_memory import FreedMemory

def grow():
    before, stay = host_memory.rss_bytes(), []
    host_memory.forget_peak()
    for round in range(8):
        blocks = []
        for number in range(8):
            blocks.append(torch.ones(2 << 20))
            stay.append(torch.ones(1000 + round))
        del blocks
        # Blocks of the next round are larger than the holes of this one.
        stay += [torch.ones(8000) for _ in range(3)]
        time.sleep(0.02)
    return (host_memory.peak_rss_bytes() - before) >> 20

with FreedMemory(watches=sys.argv[2] == "watches") as freed:
    freed.keep_below(host_memory.rss_bytes() + (int(sys.argv[1]) << 20))
    print(grow(), freed.given_back)
"""


def _grown(most_mib: int, *, watches: bool = True) -> tuple[int, int]:
    arguments = [str(most_mib), "watches" if watches else "does not"]
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=True)
    grown_mib, given_back = done.stdout.split()
    return int(grown_mib), int(given_back)


needs_glibc = pytest.mark.skipif(not has_glibc(), reason="the allocator is not glibc's")


@needs_glibc
def test_holes_are_given_back_above_the_line_and_only_there():
    roomy_mib, given_back = _grown(2000)
    assert given_back == 0
    # Two rounds live at once are 128 MiB.
    assert roomy_mib > 300
    tight_mib, given_back = _grown(150)
    assert given_back >= 1
    assert tight_mib < 180


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
    began: list[float] = []
    sizes = iter(range(1 << 30, 1 << 40, 64 << 20))

    def slowly() -> None:
        began.append(time.monotonic())
        time.sleep(0.02)

    monkeypatch.setattr(host_memory, "trim", slowly)
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: next(sizes))
    with FreedMemory() as freed:
        freed.keep_below(1 << 20)
        while len(began) < 4:
            time.sleep(0.001)
    assert min(later - earlier for earlier, later in itertools.pairwise(began)) > 0.09


def test_a_line_is_only_ever_lowered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(freed_memory.ResidentSize, "read", lambda size: 1 << 30)
    monkeypatch.setattr(host_memory, "trim", lambda: None)
    with FreedMemory() as freed:
        freed.keep_below(1 << 31)
        freed.keep_below(1 << 32)
        time.sleep(0.05)
        assert freed.given_back == 0
        freed.keep_below(1 << 29)
        freed.keep_below(1 << 32)
        time.sleep(0.05)
    assert freed.given_back == (1 if has_glibc() else 0)


def test_the_resident_size_is_that_which_psutil_reads():
    size = freed_memory.ResidentSize()
    try:
        assert size.read() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    finally:
        size.close()
