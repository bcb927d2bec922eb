"""The device a run computes on: choosing it, and reading its memory counters."""

from __future__ import annotations

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


class PeakMemory:
    """The device's peak memory since construction or the last :meth:`reset`, in bytes.

    On the CPU the device is the process: the peak is the largest resident size seen by :meth:`read`.
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

    def read(self) -> int:
        """Look at the device now and return the peak in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        on_mps = self._device.type == "mps"
        now = int(torch.mps.current_allocated_memory()) if on_mps else host_rss_bytes()
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
