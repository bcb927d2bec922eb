"""The header of a safetensors file, read without trusting a single number in it.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length N (unsigned, little
endian), N bytes of JSON, then the tensors' bytes. Everything the JSON claims is checked against the file, so that
whoever reads tensors afterwards needs no checks.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lopt_lite.errors import ModelError
from lopt_lite.files import unreadable

#: Types by their name in a header.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

#: The longest header that the safetensors library accepts as well.
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
LENGTH_BYTES = 8

_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_ELEMENTS = 2**63
_CONVERT = "convert the model to safetensors (for example by save_pretrained in transformers)"

#: What the first bytes say of files that people take for safetensors.
_OTHER_KINDS = (
    (b"PK\x03\x04", "a PyTorch (zip and pickle) file", f"{_CONVERT}; pickles can run code and are never loaded"),
    *(
        (b"\x80" + bytes([protocol]), "a Python pickle", f"{_CONVERT}; pickles can run code and are never loaded")
        for protocol in range(2, 6)
    ),
    (b"GGUF", "a GGUF file", "bring the original checkpoint in safetensors; GGUF is for inference only"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull' where it came from"),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``start`` to ``end`` are absolute byte offsets in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked header. ``tensors`` are in the order of their bytes in the file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``.

    Raises
    ------
    ModelError
        The file cannot be read, is of another kind, is truncated or too long, or its header is wrong in any way.
    """
    try:
        # Looking before opening: opening a named pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a regular file", expected="a .safetensors file")
        with open(path, "rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = _read_up_to(file, 32)
            text_bytes = _checked_length(path, prefix, file_bytes)
            file.seek(LENGTH_BYTES)
            raw = _read_up_to(file, text_bytes)
    except OSError as error:
        raise unreadable(error, path, "the weights", ModelError) from error
    if len(raw) != text_bytes:
        raise ModelError(f"{path} became shorter while it was read")
    entries = _parse(path, raw)
    metadata = _checked_metadata(path, entries.pop(METADATA_KEY, {}))
    data_start = LENGTH_BYTES + text_bytes
    tensors = [_checked_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_tiling(path, tensors, data_start, file_bytes)
    return Header(path=path, tensors={info.name: info for info in tensors}, metadata=metadata, file_bytes=file_bytes)


def parse_json_strictly(raw: bytes) -> Any:
    """Parse UTF-8 JSON, refusing what Python's parser lets through: repeated keys, NaN and lone surrogates in keys.

    Raises
    ------
    ValueError
        Anything that is wrong, nesting that is too deep included.
    """

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"the key {key!r} appears twice")
                seen.add(key)
        for key in values:
            key.encode()
        return values

    def no_constants(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(raw.decode(), object_pairs_hook=no_repeats, parse_constant=no_constants)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_up_to(file: BinaryIO | Any, count: int) -> bytes:
    parts = []
    while count > 0:
        part = file.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _checked_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    """The header's length, if the first bytes can be those of a safetensors file of this size."""
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    plausible = (
        file_bytes > LENGTH_BYTES
        and 2 <= length <= MAX_HEADER_BYTES
        and LENGTH_BYTES + length <= file_bytes
        and prefix[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
    )
    if plausible:
        return length
    # A header of 640 bytes starts like a pickle and is none; what follows in a real one makes an absurd length.
    if length > MAX_HEADER_BYTES or file_bytes <= LENGTH_BYTES:
        for magic, kind, fix in _OTHER_KINDS:
            if prefix.startswith(magic):
                raise ModelError(f"{path} is {kind}", expected="a safetensors file", fix=fix)
    if file_bytes <= LENGTH_BYTES:
        found = f"{path} has {file_bytes} bytes, too few for a safetensors file"
    elif length > MAX_HEADER_BYTES:
        found = f"{path} claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
    elif LENGTH_BYTES + length > file_bytes:
        found = f"{path} claims a header of {length:,} bytes and has only {file_bytes:,} bytes itself"
    else:
        found = f"{path} does not start with a safetensors header"
    raise ModelError(found, fix="get the file again; it is incomplete, damaged, or not a safetensors file")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = parse_json_strictly(raw)
    except ValueError as error:
        raise _broken(path, f"is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _broken(path, "is not a JSON object")
    return entries


def _checked_metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _broken(path, f"has a {METADATA_KEY} that is not an object of strings")
    return value


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"the tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"describes {where} by something else than dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise _broken(path, f"gives {where} the unknown type {dtype_name!r}", expected=f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape) or len(shape) > _MAX_DIMENSIONS:
        raise _broken(path, f"gives {where} an impossible shape")
    if math.prod(size for size in shape if size) >= _MAX_ELEMENTS:
        raise _broken(path, f"gives {where} a shape with too many elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _broken(path, f"gives {where} impossible data_offsets")
    begin, end = offsets
    dtype = DTYPES[dtype_name]
    needed_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != needed_bytes:
        raise _broken(
            path, f"gives {where} {end - begin:,} bytes; its type {dtype_name} and shape {shape} need {needed_bytes:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _check_tiling(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors, sorted by offset, must cover the rest of the file without hole or overlap."""
    position = data_start
    for info in tensors:
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "leaves a hole before it"
            raise _broken(path, f"places the tensor {info.name!r} where it {what}")
        position = info.end
    if position > file_bytes:
        raise ModelError(
            f"{path} is truncated: its tensors end at byte {position:,} and the file at {file_bytes:,}",
            fix="get the file again",
        )
    if position < file_bytes:
        raise ModelError(
            f"{path} has {file_bytes - position:,} bytes after its last tensor", fix="get the file again; it is damaged"
        )


def _broken(path: Path, what: str, *, expected: str | None = None) -> ModelError:
    return ModelError(f"the header of {path} {what}", expected=expected, fix="get the file again; it is damaged")
