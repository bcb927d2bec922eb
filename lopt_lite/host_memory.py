"""Memory of this process: its present and largest resident size, and what the C library keeps of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path

import psutil

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident size of this process where the system keeps it (Linux), else the present one, in bytes."""
    try:
        status = _STATUS.read_text()
    except OSError:
        return rss_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else rss_bytes()


def forget_peak() -> None:
    """Let the system's peak begin anew, where it keeps one and lets us."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): reset the peak resident set size


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 18
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels(count: int) -> None:
    """Let oneDNN, and PyTorch's bridge to it, keep at most ``count`` compiled kernels each.

    They keep one for every shape of a product, 1,024 by default, of up to 1 MiB: batches of ever new lengths took
    SmolLM2-135M's demo to 1.6 GiB, not 0.7. As many as a layer has kinds of products do: with 16 a step took no longer
    than with all of them (with one, half as long again). Values that the user has set stay. It counts for products
    after the first one only if called before that.
    """
    for variable in _KERNEL_CACHES:
        os.environ.setdefault(variable, str(count))


def return_freed_memory() -> None:
    """With glibc, make the allocator give freed memory back to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB in its heap, where activations of ever new sizes leave holes: a
    process that needs 0.8 GiB at any time grew to 1.4 GiB in ``benchmarks/depth.py``. (With a limit of 1 MiB instead of
    256 KiB, small layers' matrices still left 70 to 100 MiB of holes.) Giving memory back costs page faults (up to 40 %
    of the time with small layers), so it is done only for runs that have a budget to keep.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def trim() -> None:
    """With glibc: give what is free at the heap's pages back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
