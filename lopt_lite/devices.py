"""The device a run computes on: choosing it, reading its peak memory, copying to it beside computing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lopt_lite import host_memory
from lopt_lite.backends import DeviceBackend, Event, backend, takes_host_memory
from lopt_lite.errors import SettingsError
from lopt_lite.freed_memory import FreedMemory

__all__ = [
    "CopyStream",
    "DeviceBackend",
    "PeakMemory",
    "backend",
    "choose_device",
    "free_bytes",
    "host_rss_bytes",
    "keep_few_kernels",
    "memory_limited",
    "release_cached_memory",
    "set_memory_limit",
    "synchronize",
    "takes_host_memory",
    "used_bytes",
]


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
    return host_memory.rss_bytes()


class PeakMemory:
    """The device's peak memory since construction or the last :meth:`reset`, in bytes: what a budget counts.

    See :meth:`DeviceBackend.peak_bytes` of each kind of device for what that is.
    """

    def __init__(self, device: torch.device) -> None:
        self._backend = backend(device)
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        self._backend.reset_peak()
        self._at_first = self._backend.peak_bytes()

    def grown_to(self) -> int:
        """The peak if it has grown since, else 0: where the system does not forget a peak, it may be of long ago."""
        peak = self.read()
        return peak if peak > self._at_first else 0

    def read(self) -> int:
        """Look at the device now and return the peak in bytes."""
        return self._backend.peak_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on ``device`` now, in bytes."""
    return backend(device).free_bytes()


def used_bytes(device: torch.device) -> int:
    """Memory that a budget counts as used already, in bytes: on the CPU the process, elsewhere nothing."""
    return backend(device).used_bytes()


def set_memory_limit(device: torch.device, limit_bytes: int | None) -> bool:
    """Make the allocator of ``device`` keep a budget; False on the CPU. See :meth:`DeviceBackend.set_memory_limit`."""
    return backend(device).set_memory_limit(limit_bytes)


@contextmanager
def memory_limited(device: torch.device, limit_bytes: int | None) -> Iterator[FreedMemory]:
    """Keep a budget within the context, where the device can; None sets no limit. The limit is lifted afterwards.

    What it yields may be told on the way that less is enough. It keeps the process at that on the CPU, where the device
    is the process and no limit can be set.
    """
    with FreedMemory(watches=device.type == "cpu") as freed:
        if limit_bytes is None:
            yield freed
            return
        # Nothing works with none at all: what does, the plan says.
        limit_bytes = max(1, limit_bytes)
        freed.keep_below(limit_bytes)
        set_memory_limit(device, limit_bytes)
        try:
            yield freed
        finally:
            set_memory_limit(device, None)


def release_cached_memory(device: torch.device) -> None:
    """Give memory that the allocator keeps for reuse back to the device."""
    backend(device).empty_cache()


def release_everything(device: torch.device) -> None:
    """Between two parts of a run: let go of what only reference cycles still hold, here and in the allocator.

    Layers, their hooks and the objects that drive them refer to each other, so that without this the weights and
    gradients of one part would still be there when the next one takes its own.
    """
    gc.collect()
    backend(device).empty_cache()


def keep_few_kernels(device: torch.device) -> None:
    """On the CPU, keep few compiled kernels. See :func:`host_memory.keep_few_kernels`."""
    if device.type == "cpu":
        host_memory.keep_few_kernels()


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on ``device`` is done (so that a clock read afterwards is honest)."""
    backend(device).synchronize()


class CopyStream:
    """Copies from host buffers to device buffers beside computing, one pair of buffers per slab.

    A slab's life is: its host buffer is filled and its copy started (by a reader thread), computing waits for the copy
    and uses the device buffer (in the thread that made this object), and both are overwritten by the next filling.

    * Where the device has streams (CUDA), a copy runs on a stream of its own from pinned memory, and events keep order
      both ways: computing waits for the copy of its slab (:meth:`wait_for_copy`), a copy waits for the computing that
      last used its slab (:meth:`mark_used`), and the host buffer is not filled again before the last copy out of it is
      done (:meth:`wait_until_unused`). Buffers live until :meth:`close`, which waits for the copies, so the allocator
      cannot give their memory to anyone in between. All computing has to be on one stream.
    * On MPS the copy is left to :meth:`wait_for_copy`, in the computing thread, and done when that returns. The device
      has one stream, on which it comes after the computing queued before; PyTorch does not promise that a second thread
      may queue work there.
    * On the CPU host and device buffer are the same memory, there is nothing to copy, and computing is done when its
      call returns.

    Parameters
    ----------
    device:
        Where to copy to.
    via:
        What that device offers; by default :func:`backend` of it.
    """

    def __init__(self, device: torch.device, *, via: DeviceBackend | None = None) -> None:
        self._backend = backend(device) if via is None else via
        self._stream = self._backend.new_stream()
        self._copied: dict[int, Event] = {}
        self._used: dict[int, Event] = {}
        self._left: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the host, pinned where that makes copies asynchronous."""
        return self._backend.host_buffer(size_bytes)

    def device_buffer(self, host: torch.Tensor) -> torch.Tensor:
        """The buffer on the device that belongs to ``host``: the same memory on the CPU."""
        if self._backend.shares_host_memory:
            return host
        buffer = self._backend.device_buffer(host.numel())
        if self._stream is not None:
            # The allocator may have handed out memory that work queued for computing still reads; that is in order for
            # computing, but the copies run beside it.
            self._stream.wait_event(self._backend.compute_stream().record_event())
        return buffer

    def copy(self, slab: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Start the copy of a slab; called by the reader thread once ``host`` is filled."""
        if self._backend.shares_host_memory:
            return
        if self._stream is None:
            self._left[slab] = (host, device)
            return
        used = self._used.pop(slab, None)
        if used is not None:
            self._stream.wait_event(used)
        self._backend.copy(host, device, self._stream)
        self._copied[slab] = self._stream.record_event()

    def wait_for_copy(self, slab: int) -> None:
        """Make the computing that is queued from now on wait for the slab's copy; called once the reader is done."""
        if slab in self._left:
            self._backend.copy(*self._left.pop(slab), None)
        elif slab in self._copied:
            self._backend.compute_stream().wait_event(self._copied[slab])

    def mark_used(self, slab: int) -> None:
        """Note that everything queued so far may still read the slab."""
        if self._stream is not None:
            self._used[slab] = self._backend.compute_stream().record_event()

    def wait_until_unused(self, slab: int) -> None:
        """Block the reader until the last copy out of the slab's host buffer is done, so that it may be refilled."""
        if slab in self._copied:
            self._copied[slab].synchronize()

    def close(self) -> None:
        """Wait until no copy uses a buffer any more, so that they may be freed. The reader must have stopped."""
        self._left.clear()
        if self._stream is not None:
            self._stream.synchronize()
