"""Tensors put aside for later: on the device while they fit there, then in host memory, then in a file.

The file is scratch: it has no name any more once it is open (where the system allows that), so that nothing is left
behind whatever happens to the process, and nothing of it is ever read by another one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import cast

import torch

from lopt_lite.files import explain_os_error

#: Offsets in the file are multiples of this.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class SpillLimits:
    """How much may be put aside where, in bytes. What exceeds both goes to a file."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class _OnDisk:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Spill:
    """Keeps tensors by key and gives each one back, bit for bit, on the device it is wanted on.

    On the CPU the device is the host, so that only ``device_bytes`` counts and everything else goes to the file.

    Parameters
    ----------
    limits:
        See :class:`SpillLimits`.
    directory:
        Where the file is made, when one is needed.
    device:
        Where tensors come from and go back to.
    """

    def __init__(self, limits: SpillLimits, directory: Path, device: torch.device) -> None:
        self._limits, self._directory, self._device = limits, directory, device
        self._kept: dict[Hashable, torch.Tensor | _OnDisk] = {}
        self._device_bytes = self._host_bytes = 0
        self._file: FileIO | None = None
        self._end = 0
        self._holes: dict[int, list[int]] = {}
        self.written_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is put aside. (No ``__len__``: an empty one must not count as none.)"""
        return not self._kept

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Put ``tensor`` aside (without its graph); ``key`` must be free.

        Raises
        ------
        DoesNotFitError
            The disk is full.
        """
        if key in self._kept:
            raise ValueError(f"{key!r} is put aside already")
        tensor = tensor.detach()
        nbytes = tensor.numel() * tensor.element_size()
        if self._device_bytes + nbytes <= self._limits.device_bytes:
            self._device_bytes += nbytes
            self._kept[key] = tensor
        elif self._device.type != "cpu" and self._host_bytes + nbytes <= self._limits.host_bytes:
            self._host_bytes += nbytes
            self._kept[key] = tensor.to("cpu")
        else:
            self._kept[key] = self._write(tensor, nbytes)

    def take(self, key: Hashable) -> torch.Tensor:
        """Give the tensor called ``key`` back, on the device, and forget it."""
        kept = self._kept.pop(key)
        if isinstance(kept, torch.Tensor):
            self._release(kept)
            return kept.to(self._device)
        tensor = self._read(kept)
        self._holes.setdefault(kept.nbytes, []).append(kept.start)
        return tensor.to(self._device)

    def peek(self, key: Hashable) -> torch.Tensor:
        """The tensor called ``key``, on the device; it stays put aside, so it must not be changed."""
        kept = self._kept[key]
        return (kept if isinstance(kept, torch.Tensor) else self._read(kept)).to(self._device)

    def replace(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Put ``tensor`` aside in place of what ``key`` stood for, if it stood for anything."""
        kept = self._kept.get(key)
        if isinstance(kept, _OnDisk) and kept.shape == tuple(tensor.shape) and kept.dtype == tensor.dtype:
            self._write_at(kept.start, tensor.detach())
            return
        if kept is not None:
            self.forget(key)
        self.put(key, tensor)

    def forget(self, key: Hashable) -> None:
        """Forget the tensor called ``key``."""
        kept = self._kept.pop(key)
        if isinstance(kept, _OnDisk):
            self._holes.setdefault(kept.nbytes, []).append(kept.start)
        else:
            self._release(kept)

    def clear(self) -> None:
        """Forget everything; the file keeps its size for the next use."""
        self._kept.clear()
        self._holes.clear()
        self._device_bytes = self._host_bytes = self._end = 0

    def close(self) -> None:
        """Forget everything and let go of the file."""
        self.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, tensor: torch.Tensor, nbytes: int) -> _OnDisk:
        holes = self._holes.get(nbytes)
        if holes:
            start = holes.pop()
        else:
            start = self._end
            self._end += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._write_at(start, tensor)
        return _OnDisk(start, tuple(tensor.shape), tensor.dtype)

    def _write_at(self, start: int, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        data = memoryview(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
        try:
            if self._file is None:
                self._file = cast(FileIO, tempfile.TemporaryFile(buffering=0, dir=self._directory, prefix=".spill-"))
            self._file.seek(start)
            written = 0
            while written < nbytes:
                written += self._file.write(data[written:])
        except OSError as error:
            raise explain_os_error(error, self._directory, "put tensors aside in") from error
        self.written_bytes += nbytes

    def _release(self, kept: torch.Tensor) -> None:
        nbytes = kept.numel() * kept.element_size()
        if kept.device.type == self._device.type:
            self._device_bytes -= nbytes
        else:
            self._host_bytes -= nbytes

    def _read(self, place: _OnDisk) -> torch.Tensor:
        assert self._file is not None
        flat = torch.empty(place.nbytes, dtype=torch.uint8)
        view = memoryview(flat.numpy())
        done = 0
        try:
            self._file.seek(place.start)
            while done < place.nbytes:
                count = self._file.readinto(view[done:])
                if not count:
                    raise OSError("the scratch file ended early")
                done += count
        except OSError as error:
            raise explain_os_error(error, self._directory, "read tensors back from") from error
        return flat.view(place.dtype).reshape(place.shape)
