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


_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = 24


def keep_few_kernels() -> None:
    """Let oneDNN, and PyTorch's bridge to it, keep at most 24 compiled kernels each.

    They keep one for every shape of a product, 1,024 by default, of up to 1 MiB: batches of ever new lengths took
    SmolLM2-135M's demo to 1.6 GiB, not 0.7. There are about as many as a layer has kinds of products, forward and
    backward, with its adapter: with 16 a run took 9 % longer than with 256, with 24 it took 2 %. Values that
    the user has set stay. It counts for products after the first one only if called before that.
    """
    for variable in _KERNEL_CACHES:
        os.environ.setdefault(variable, str(_KERNELS))


def has_glibc() -> bool:
    """Whether the C library, and so the allocator, is glibc."""
    return platform.libc_ver()[0] == "glibc"


def trim() -> None:
    """With glibc: give whole pages that are free anywhere in its heaps back to the system."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)
