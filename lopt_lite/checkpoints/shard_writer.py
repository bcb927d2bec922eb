"""Writing safetensors files tensor by tensor, laid out so that a file can be used as one aligned buffer.

The safetensors library wants all tensors of a file in memory at once; here there is only one at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lopt_lite.checkpoints.header import DTYPE_NAMES, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY
from lopt_lite.files import atomic_writer

#: Every tensor whose size is a multiple of this starts at a multiple of it, in the file and in its data part.
ALIGNMENT_BYTES = 16

_WRITE_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardRecord:
    """A file that was written. ``sha256`` is of the whole file, ``tensors`` are in file order."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...]


def aligned_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Sort so that every tensor is aligned although the format allows no holes.

    Sizes divisible by 16 come first, then by 8, 4, 2, 1; the order is kept within each. So a tensor starts at a
    multiple of the largest of these powers that divides its own size.
    """
    return sorted(specs, key=lambda spec: -math.gcd(spec.nbytes, ALIGNMENT_BYTES))


def write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> ShardRecord:
    """Write ``path`` atomically and durably, holding one tensor at a time.

    Parameters
    ----------
    specs:
        What the file will hold, in file order (see :func:`aligned_order`).
    tensors:
        Name and content of each, in the order of ``specs``; on any device.
    metadata:
        Strings for the header. Default: ``{"format": "pt"}``, which transformers looks for.

    Raises
    ------
    ValueError
        The tensors are not those of ``specs``, or the order leaves one of them misaligned.
    DoesNotFitError, RunDirectoryError
        The disk is full or the file cannot be written.
    """
    head = _header_bytes(specs, {"format": "pt"} if metadata is None else metadata)
    with atomic_writer(path) as file:
        target = _HashingWriter(file)
        target.write(head)
        given = iter(tensors)
        for spec in specs:
            name, tensor = next(given, ("nothing", torch.empty(0)))
            if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(f"expected {spec}, got {name}: {tensor.dtype} {tuple(tensor.shape)}")
            target.write_tensor(tensor)
            del tensor  # before the next one is made
        extra = next(given, None)
        if extra is not None:
            raise ValueError(f"got {extra[0]} after the last tensor")
    return ShardRecord(path.name, target.count, target.digest.hexdigest(), tuple(spec.name for spec in specs))


def _header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    position = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"{spec.name} is listed twice, or is not a tensor's name")
        if position % math.gcd(spec.nbytes, ALIGNMENT_BYTES):
            raise ValueError(f"{spec.name} would be misaligned; put the specs in aligned_order")
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text):,} bytes cannot be read back")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


class _HashingWriter:
    """Counts and hashes what it writes, so that the file need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.count += len(content)

    def write_tensor(self, tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        view = memoryview(flat.numpy())
        for begin in range(0, len(view), _WRITE_BYTES):
            self.write(view[begin : begin + _WRITE_BYTES])
