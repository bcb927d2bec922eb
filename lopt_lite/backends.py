"""What differs between kinds of devices: memory counters, the memory limit, streams and pinned buffers.

One small class per kind, obtained with :func:`backend`. Nothing else in the project asks a device what kind it is in
order to measure, limit or copy.
"""

from __future__ import annotations

from typing import Any, Protocol

import psutil
import torch

from lopt_lite import host_memory


class Event(Protocol):
    """A mark in a stream: done when everything queued on the stream before it is done."""

    def synchronize(self) -> None:
        """Block the calling thread until the event is done."""


class Stream(Protocol):
    """A queue of work on a device, done in order; two queues run beside each other. ``torch.cuda.Stream`` is one."""

    def wait_event(self, event: Any) -> None:
        """Make the work queued from now on wait for ``event``; returns at once."""

    def record_event(self) -> Any:
        """An :class:`Event` after everything queued so far."""

    def synchronize(self) -> None:
        """Block the calling thread until everything queued so far is done."""


class DeviceBackend:
    """What every kind of device offers. What is written here holds for the CPU, see :class:`CpuBackend`.

    Counters of the largest size count from construction or the last :meth:`reset_peak`. They belong to the process,
    not to this object: a second object that resets them resets them for all.

    Attributes
    ----------
    device:
        The device, with its number where it has one: a new thread's current CUDA device is number 0, whatever this
        thread's is.
    shares_host_memory:
        Tensors on the device and on the host are the same memory: nothing needs to be copied.
    """

    shares_host_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        """Memory that could be allocated now, in bytes."""
        raise NotImplementedError

    def used_bytes(self) -> int:
        """Memory that a budget counts as used before anything is loaded, in bytes: nothing on a GPU."""
        return 0

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        raise NotImplementedError

    def peak_bytes(self) -> int:
        """The largest size that the memory limit counts, in bytes: what to hold against the budget."""
        raise NotImplementedError

    def peak_live_bytes(self) -> int:
        """The largest size of what was in use, without what the allocator keeps for reuse: what a prediction meets."""
        return self.peak_bytes()

    def set_memory_limit(self, limit_bytes: int | None) -> bool:
        """Make allocations fail with ``torch.OutOfMemoryError`` (MPS: ``RuntimeError``) that would break a budget.

        The limit belongs to the process and the device, and stays until it is set anew.

        Parameters
        ----------
        limit_bytes:
            Most that may be taken from the device, greater than 0; None lifts the limit.

        Returns
        -------
        Whether the device keeps the limit.

        Raises
        ------
        ValueError
            ``limit_bytes`` is not greater than 0.
        """
        raise NotImplementedError

    def empty_cache(self) -> None:
        """Give memory that the allocator keeps for reuse back to the device."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done (so that a clock read afterwards is honest)."""

    def new_stream(self) -> Stream | None:
        """A stream for copies beside computing; None where copies cannot run beside it, or nothing is copied."""
        return None

    def compute_stream(self) -> Stream:
        """The stream on which the calling thread computes; only where :meth:`new_stream` gives one."""
        raise NotImplementedError

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the host, pinned where that makes copies asynchronous."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def device_buffer(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer on the device. Its memory belongs to the stream on which the calling thread computes."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream | None) -> None:
        """Copy a host buffer to a device buffer: queued on ``stream``, or done on return if that is None."""
        target.copy_(source)


class CpuBackend(DeviceBackend):
    """The CPU: the device is the process, interpreter and libraries included.

    Linux keeps the true peak of the process's resident size; where it cannot be reset, it is the peak since the process
    began, and on other systems it is the largest size seen by :meth:`peak_bytes`, which misses what was allocated and
    freed in between. No limit can be set: an operating system's limits count address space, of which a process has
    many times more than memory. A budget on the CPU is kept by prediction.
    """

    shares_host_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._peak_bytes = 0

    def empty_cache(self) -> None:
        """Give memory that the C library keeps for reuse back to the system."""
        host_memory.trim()

    def free_bytes(self) -> int:
        """Memory that the system could give without swapping, in bytes."""
        return int(psutil.virtual_memory().available)

    def used_bytes(self) -> int:
        """Resident memory of this process, in bytes."""
        return host_memory.rss_bytes()

    def reset_peak(self) -> None:
        """Forget the peak so far, as far as the system lets us."""
        self._peak_bytes = 0
        host_memory.forget_peak()

    def peak_bytes(self) -> int:
        """Largest resident size of the process, in bytes."""
        self._peak_bytes = max(self._peak_bytes, host_memory.peak_rss_bytes())
        return self._peak_bytes

    def set_memory_limit(self, limit_bytes: int | None) -> bool:
        """Does nothing: there is no such limit. See the class."""
        _check_limit(limit_bytes)
        return False

    def device_buffer(self, size_bytes: int) -> torch.Tensor:
        """The same as :meth:`host_buffer`."""
        return self.host_buffer(size_bytes)


class CudaBackend(DeviceBackend):
    """A CUDA device.

    PyTorch's limit counts what its allocator has *reserved* from the device, which is the tensors, what it keeps for
    reuse, and holes. At the limit it first gives back what it keeps. So :meth:`peak_bytes`, to be held against the
    budget, is the reserved peak, and :meth:`peak_live_bytes`, to be held against a prediction, that of the tensors:
    how much is reserved beyond them depends on the limit itself. Neither counts the CUDA context (a few hundred MiB,
    taken by the driver).

    Pinned memory is rounded up to a power of two by PyTorch, and kept for the next buffer of that size when it is
    freed.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))

    def free_bytes(self) -> int:
        """Memory of the device that no process has taken, in bytes."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Most that the allocator had reserved, in bytes."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def peak_live_bytes(self) -> int:
        """Most that tensors took, in bytes."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def set_memory_limit(self, limit_bytes: int | None) -> bool:
        """Limit what the allocator may reserve; a limit beyond the device's memory is the device's memory."""
        _check_limit(limit_bytes)
        total_bytes = torch.cuda.get_device_properties(self.device).total_memory
        fraction = 1.0 if limit_bytes is None else min(1.0, limit_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)
        return True

    def empty_cache(self) -> None:
        """Give reserved memory without tensors back to the device."""
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.device)

    def new_stream(self) -> Stream:
        """A new stream."""
        return torch.cuda.Stream(self.device)

    def compute_stream(self) -> Stream:
        """The calling thread's current stream."""
        return torch.cuda.current_stream(self.device)

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """A pinned buffer: from other memory the driver copies through a buffer of its own, and blocks."""
        with torch.cuda.device(self.device):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor, stream: Stream | None) -> None:
        """Queue the copy on ``stream``; None is the calling thread's current one."""
        with torch.cuda.stream(stream):  # also makes the stream's device this thread's current one
            target.copy_(source, non_blocking=True)


class MpsBackend(DeviceBackend):
    """An Apple GPU.

    It has one stream for everything, so copies run in order with computing and not beside it. The limit counts all that
    Metal has given to the process (``driver_allocated_memory``), and so does :meth:`peak_bytes`; tensors alone are
    :meth:`peak_live_bytes`. Both are the largest sizes seen when asked, which misses what was allocated and freed in
    between.
    """

    #: PyTorch's own, where no limit was set: times the recommended size.
    _DEFAULT_FRACTION = 1.7
    #: The largest that PyTorch takes.
    _LARGEST_FRACTION = 2.0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.reset_peak()

    def free_bytes(self) -> int:
        """What is left of the size that Metal recommends for a process, in bytes."""
        return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory()))

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        self._peak_bytes = self._peak_live_bytes = 0

    def peak_bytes(self) -> int:
        """Most that Metal was seen to have given to the process, in bytes."""
        self._peak_bytes = max(self._peak_bytes, int(torch.mps.driver_allocated_memory()))
        return self._peak_bytes

    def peak_live_bytes(self) -> int:
        """Most that tensors were seen to take, in bytes."""
        self._peak_live_bytes = max(self._peak_live_bytes, int(torch.mps.current_allocated_memory()))
        return self._peak_live_bytes

    def set_memory_limit(self, limit_bytes: int | None) -> bool:
        """Limit what Metal gives; at most twice the recommended size can be named."""
        _check_limit(limit_bytes)
        if limit_bytes is None:
            fraction = self._DEFAULT_FRACTION
        else:
            # Not 0, which would mean no limit: limit_bytes is at least 1.
            fraction = min(self._LARGEST_FRACTION, limit_bytes / int(torch.mps.recommended_max_memory()))
        torch.mps.set_per_process_memory_fraction(fraction)
        return True

    def empty_cache(self) -> None:
        """Give kept buffers back to Metal."""
        torch.mps.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device's stream."""
        torch.mps.synchronize()


def backend(device: torch.device) -> DeviceBackend:
    """What ``device`` offers.

    Raises
    ------
    ValueError
        ``device`` is neither CPU, CUDA nor MPS.
    """
    kinds: dict[str, type[DeviceBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "mps": MpsBackend}
    if device.type not in kinds:
        raise ValueError(f"device {device} is none of {', '.join(kinds)}")
    return kinds[device.type](device)


def _check_limit(limit_bytes: int | None) -> None:
    if limit_bytes is not None and limit_bytes <= 0:
        raise ValueError(f"a memory limit of {limit_bytes} bytes; expected more than 0, or None for no limit")
