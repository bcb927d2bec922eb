"""What differs between kinds of devices: memory counters, the memory limit, streams and pinned buffers.

One small class per kind, obtained with :func:`backend`. Nothing else in the project asks a device what kind it is in
order to measure, limit or copy.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import psutil
import torch

from lopt_lite import control_group, host_memory


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
    takes_host_memory:
        What the device takes is missing on the host: there is no other memory to put things aside in.
    """

    shares_host_memory = False
    takes_host_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        """Memory that could be allocated now, in bytes."""
        raise NotImplementedError

    def used_bytes(self) -> int:
        """Memory that a budget counts as used before anything is loaded, in bytes: nothing on a GPU."""
        return 0

    def attainable_bytes(self, budget_bytes: int) -> int:
        """As much of a budget as there can be."""
        return budget_bytes

    def fuses_attention(self, dtype: torch.dtype) -> bool:
        """Whether PyTorch has an attention for training in ``dtype`` that keeps no weights of all pairs of tokens."""
        return True

    def lacks_bfloat16(self) -> bool:
        """Whether products of bfloat16 matrices are made without units for them."""
        return False

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
    takes_host_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._peak_bytes = 0

    def empty_cache(self) -> None:
        """Give memory that the C library keeps for reuse back to the system."""
        host_memory.trim()

    def free_bytes(self) -> int:
        """Memory that the system, or the container, could give without swapping, in bytes."""
        available = int(psutil.virtual_memory().available)
        left = control_group.left_bytes()
        return available if left is None else min(available, left)

    def used_bytes(self) -> int:
        """Resident memory of this process, in bytes, without what was freed: that is given back."""
        # Reading data and a tokenizer leaves 30 MiB of holes. Whether they are still there depends on the budget.
        host_memory.trim()
        return host_memory.rss_bytes()

    def reset_peak(self) -> None:
        """Forget the peak so far, as far as the system lets us, and what was freed."""
        host_memory.trim()
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

    def attainable_bytes(self, budget_bytes: int) -> int:
        """No more than is free or taken by this process: another program, or a desktop, may have the rest."""
        return min(budget_bytes, self.free_bytes() + int(torch.cuda.memory_reserved(self.device)))

    def fuses_attention(self, dtype: torch.dtype) -> bool:
        """Flash attention needs compute capability 8.0; the memory-efficient one knows bfloat16 from there on only."""
        return dtype != torch.bfloat16 or torch.cuda.get_device_capability(self.device) >= (8, 0)

    def lacks_bfloat16(self) -> bool:
        """Below compute capability 8.0."""
        return torch.cuda.get_device_capability(self.device) < (8, 0)

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
    """An Apple GPU. Its memory is the host's.

    It has one stream for everything, so copies run in order with computing and not beside it. The limit counts all that
    Metal has given to the process (``driver_allocated_memory``), and so does :meth:`peak_bytes`; tensors alone are
    :meth:`peak_live_bytes`. Both are the largest sizes seen when asked, which misses what was allocated and freed in
    between.
    """

    takes_host_memory = True
    #: PyTorch's own, where no limit was set: times the recommended size.
    _DEFAULT_FRACTION = 1.7
    #: From what share of the recommended size on PyTorch's allocator is careful; its own value, and the least.
    _CAREFUL, _LEAST_CAREFUL = 1.4, 0.01
    #: Until then it takes memory in pieces of this size.
    _PIECE_BYTES = 2**30
    #: Share of the machine's memory that Metal recommends, about.
    _RECOMMENDED_SHARE = 2 / 3
    #: The largest that PyTorch takes.
    _LARGEST_FRACTION = 2.0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.reset_peak()

    def free_bytes(self) -> int:
        """What is left of the size that Metal recommends for a process, and is free on the host, in bytes."""
        left = int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
        return max(0, min(left, int(psutil.virtual_memory().available)))

    def fuses_attention(self, dtype: torch.dtype) -> bool:
        """Metal's attention has no backward pass."""
        return False

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
            self._be_careful_within(limit_bytes)
            # Not 0, which would mean no limit: limit_bytes is at least 1.
            fraction = min(self._LARGEST_FRACTION, limit_bytes / int(torch.mps.recommended_max_memory()))
        torch.mps.set_per_process_memory_fraction(fraction)
        return True

    def _be_careful_within(self, limit_bytes: int) -> None:
        """Keep the allocator from taking a whole piece where the limit has no room for one.

        Beyond a mark that only an environment variable sets, read when the device is first used, it takes memory in the
        sizes asked for. What Metal recommends is not known before that, and guessed.
        """
        recommended = self._RECOMMENDED_SHARE * psutil.virtual_memory().total
        mark = (limit_bytes - 1.25 * self._PIECE_BYTES) / recommended
        mark = min(self._CAREFUL, max(self._LEAST_CAREFUL, mark))
        os.environ.setdefault("PYTORCH_MPS_LOW_WATERMARK_RATIO", f"{mark:.3f}")

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
    return _kind(device)(device)


def takes_host_memory(device: torch.device) -> bool:
    """See :class:`DeviceBackend`; known of a device that is not there, too."""
    return _kind(device).takes_host_memory


def _kind(device: torch.device) -> type[DeviceBackend]:
    kinds: dict[str, type[DeviceBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "mps": MpsBackend}
    if device.type not in kinds:
        raise ValueError(f"device {device} is none of {', '.join(kinds)}")
    return kinds[device.type]


def _check_limit(limit_bytes: int | None) -> None:
    if limit_bytes is not None and limit_bytes <= 0:
        raise ValueError(f"a memory limit of {limit_bytes} bytes; expected more than 0, or None for no limit")
