"""The device a run computes on: choosing it, and reading its memory counters."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
from pathlib import Path

import psutil
import torch

from lopt_lite.errors import SettingsError


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cuda``, ``mps`` or ``cpu`` into a device that exists on this machine.

    Raises
    ------
    SettingsError
        The named device is not there.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and not cuda:
        raise SettingsError(
            "--device cuda: PyTorch sees no CUDA device",
            fix="install a CUDA build of PyTorch and a driver, or use --device cpu",
        )
    if name == "mps" and not mps:
        raise SettingsError("--device mps: PyTorch sees no Apple GPU", fix="use --device cpu")
    return torch.device(name)


def host_rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _host_peak_rss_bytes() -> int:
    """Largest resident size of this process where the system keeps it (Linux), else the present one, in bytes."""
    try:
        status = _STATUS.read_text()
    except OSError:
        return host_rss_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else host_rss_bytes()


class PeakMemory:
    """The device's peak memory since construction or the last :meth:`reset`, in bytes.

    On the CPU the device is the process. Linux keeps the true peak of its resident size; where that cannot be reset, it
    is the peak since the process began. Elsewhere, and on MPS, it is the largest size seen by :meth:`read`, which
    misses what was allocated and freed in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        self._peak_bytes = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu":
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")  # proc(5): reset the peak resident set size

    def read(self) -> int:
        """Look at the device now and return the peak in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        on_mps = self._device.type == "mps"
        now = int(torch.mps.current_allocated_memory()) if on_mps else _host_peak_rss_bytes()
        self._peak_bytes = max(self._peak_bytes, now)
        return self._peak_bytes


def release_cached_memory(device: torch.device) -> None:
    """Give memory that the allocator keeps for reuse back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on ``device`` is done (so that a clock read afterwards is honest)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 20


def return_freed_memory(device: torch.device) -> None:
    """On the CPU with glibc: make the allocator give freed memory back to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB in its heap, where activations of ever new sizes leave holes: a
    process that needs 0.8 GiB at any time grew to 1.4 GiB in ``benchmarks/depth.py``. Giving memory back costs page
    faults (up to 40 % of the time with small layers), so it is done only for runs that have a budget to keep.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


class CopyStream:
    """Copies from host buffers to device buffers beside computing, one pair of buffers per slab.

    On CUDA a copy runs on a stream of its own from pinned memory, and events keep order both ways: computing waits for
    the copy of its slab, a copy waits for the computing that last used its slab. On MPS copies are synchronous. On the
    CPU host and device buffer are the same memory and there is nothing to copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._copied: dict[int, torch.cuda.Event] = {}
        self._used: dict[int, torch.cuda.Event] = {}

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the host, pinned where that makes copies asynchronous."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._cuda)

    def device_buffer(self, host: torch.Tensor) -> torch.Tensor:
        """The buffer on the device that belongs to ``host``: the same memory on the CPU."""
        return host if self._device.type == "cpu" else torch.empty_like(host, device=self._device)

    def copy(self, slab: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Start the copy of a slab; called by the reader thread once ``host`` is filled."""
        if self._device.type == "cpu":
            return
        if self._stream is None:
            device.copy_(host)
            return
        with torch.cuda.stream(self._stream):
            if slab in self._used:
                self._stream.wait_event(self._used.pop(slab))
            device.copy_(host, non_blocking=True)
            self._copied[slab] = self._stream.record_event()

    def wait_for_copy(self, slab: int) -> None:
        """Make the computing that is queued from now on wait for the slab's copy."""
        event = self._copied.get(slab)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def mark_used(self, slab: int) -> None:
        """Note that everything queued so far may still read the slab."""
        if self._cuda:
            self._used[slab] = torch.cuda.current_stream(self._device).record_event()

    def wait_until_unused(self, slab: int) -> None:
        """Block the reader until the last copy out of the slab's host buffer is done, so that it may be refilled."""
        event = self._copied.get(slab)
        if event is not None:
            event.synchronize()
