"""Reading a checkpoint's tensors, whole or by rows, wherever they are sharded.

Reads are explicit (no memory mapping): host memory is exactly the tensor asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from lopt_lite.checkpoints.header import DTYPE_NAMES, Header, TensorInfo
from lopt_lite.errors import ModelError

#: How much of a tensor's start, middle and end goes into the fingerprint.
FINGERPRINT_SAMPLE_BYTES = 4096

#: One system call reads at most this much (the kernel's own limit is about 2 GiB).
_READ_BYTES = 1 << 28


class TensorFiles:
    """The tensors of one checkpoint, by name. May be used from several threads.

    Parameters
    ----------
    locations:
        For each tensor name, the checked header of the file that holds it.
    before_opening:
        Called before a file is opened; may raise. More than one thread may call it at once.
    """

    def __init__(
        self, locations: Mapping[str, Header], *, before_opening: Callable[[Path], None] = lambda path: None
    ) -> None:
        self._infos = {name: header.tensors[name] for name, header in locations.items()}
        self._headers = dict(locations)
        self._before_opening = before_opening
        self._open_files: dict[Path, _OpenFile] = {}
        self._opening = threading.Lock()
        self._fingerprint: str | None = None

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor.

        Raises
        ------
        ModelError
            There is no such tensor.
        """
        if name not in self._infos:
            raise ModelError(f"the checkpoint has no tensor {name!r}")
        return self._infos[name]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        self.info(name)
        return self._headers[name].path

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._infos.values())

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into fresh memory.

        Raises
        ------
        ModelError
            There is no such tensor, or its file cannot be read.
        """
        info = self.info(name)
        return self._read_bytes(name, 0, info.nbytes).view(info.dtype).reshape(info.shape)

    def read_range(self, name: str, first_row: int, end_row: int) -> torch.Tensor:
        """Read rows ``first_row`` up to ``end_row`` (exclusive) along the first dimension.

        Returns
        -------
        Tensor of shape [end_row - first_row, ...].

        Raises
        ------
        ModelError
            The rows are not all there, or the file cannot be read.
        """
        info, row_bytes = self._rows_of(name)
        if not 0 <= first_row <= end_row <= info.shape[0]:
            raise ModelError(f"rows {first_row} to {end_row} of {name!r} were asked for; it has {info.shape[0]} rows")
        data = self._read_bytes(name, first_row * row_bytes, (end_row - first_row) * row_bytes)
        return data.view(info.dtype).reshape(end_row - first_row, *info.shape[1:])

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Gather rows along the first dimension, in the order given; each distinct row is read once.

        Parameters
        ----------
        rows:
            Row numbers, int64 on the CPU, shape [n].

        Returns
        -------
        Tensor of shape [n, ...].

        Raises
        ------
        ModelError
            A row that is not there, or the file cannot be read.
        ValueError
            ``rows`` is not a vector of int64.
        """
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"rows must be an int64 vector, not {rows.dtype} of shape {tuple(rows.shape)}")
        info, row_bytes = self._rows_of(name)
        if rows.numel() == 0:
            return torch.empty((0, *info.shape[1:]), dtype=info.dtype)
        distinct, places = torch.unique(rows, return_inverse=True)
        for row in (int(distinct[0]), int(distinct[-1])):
            if not 0 <= row < info.shape[0]:
                raise ModelError(
                    f"row {row} of {name!r} was asked for; it has {info.shape[0]} rows",
                    fix="use the tokenizer that belongs to this model",
                )
        gathered = torch.empty(distinct.numel() * row_bytes, dtype=torch.uint8)
        file = self._open(name)
        # A run is a stretch of adjacent rows, read at once; it starts wherever the step from the row before is not 1.
        starts = [0, *(torch.nonzero(torch.diff(distinct) != 1).flatten() + 1).tolist(), distinct.numel()]
        for begin, end in itertools.pairwise(starts):
            offset = info.start + int(distinct[begin]) * row_bytes
            file.read_into(gathered[begin * row_bytes : end * row_bytes], offset)
        picked = gathered.reshape(distinct.numel(), row_bytes)[places]
        return picked.view(-1).view(info.dtype).reshape(rows.numel(), *info.shape[1:])

    def read_stretch(self, name: str, offset: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer`` (uint8, contiguous, on the CPU) from byte ``offset`` of the file that holds ``name``.

        Raises
        ------
        ModelError
            The file cannot be read, or ends before.
        """
        self._open(name).read_into(buffer, offset)

    def fingerprint(self) -> str:
        """A hash that changes with the weights but not with sharding, file names or dates.

        It covers every tensor's name, type and shape, and 4 KiB each of its start, middle and end.

        Raises
        ------
        ModelError
            A file cannot be read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name in sorted(self._infos):
                info = self._infos[name]
                digest.update(json.dumps([name, DTYPE_NAMES[info.dtype], info.shape]).encode())
                last = max(info.nbytes - FINGERPRINT_SAMPLE_BYTES, 0)
                for offset in (0, last // 2, last):
                    count = min(FINGERPRINT_SAMPLE_BYTES, info.nbytes)
                    digest.update(self._read_bytes(name, offset, count).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._opening:
            for file in self._open_files.values():
                file.close()
            self._open_files.clear()

    def _rows_of(self, name: str) -> tuple[TensorInfo, int]:
        info = self.info(name)
        if not info.shape:
            raise ModelError(f"the tensor {name!r} is a single number; it has no rows")
        return info, info.nbytes // max(info.shape[0], 1)

    def _read_bytes(self, name: str, offset: int, count: int) -> torch.Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        if count:
            self._open(name).read_into(buffer, self._infos[name].start + offset)
        return buffer

    def _open(self, name: str) -> _OpenFile:
        header = self._headers[name]
        with self._opening:
            file = self._open_files.get(header.path)
        if file is not None:
            return file
        # Without the lock: it may take long, and others go on reading other files.
        self._before_opening(header.path)
        with self._opening:
            if header.path not in self._open_files:
                self._open_files[header.path] = _OpenFile(header)
            return self._open_files[header.path]


class _OpenFile:
    """One file, read at explicit offsets into memory that the caller brings."""

    def __init__(self, header: Header) -> None:
        self._path = header.path
        self._lock = threading.Lock()
        try:
            self._file: IO[bytes] = open(header.path, "rb", buffering=0)
            size_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if size_bytes != header.file_bytes:
            self._file.close()
            raise ModelError(
                f"{self._path} had {header.file_bytes:,} bytes when it was first read, and now has {size_bytes:,}",
                fix="leave the model's files alone while they are in use",
            )

    def read_into(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill ``buffer`` (uint8, contiguous) from byte ``offset`` of the file."""
        view = memoryview(buffer.numpy())
        try:
            # Seek and read, not pread: that exists everywhere. The lock keeps the pair together.
            with self._lock:
                self._file.seek(offset)
                while view:
                    count = self._file.readinto(view[:_READ_BYTES])  # type: ignore[attr-defined]
                    if not count:
                        raise ModelError(f"{self._path} ended while it was read", fix="get the file again")
                    view = view[count:]
        except OSError as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        self._file.close()

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(
            f"cannot read {self._path}: {error.strerror or error}", fix="check the file's rights and its disk"
        )
