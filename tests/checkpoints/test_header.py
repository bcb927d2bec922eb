"""The strict safetensors header reader."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lopt_lite.checkpoints.header import DTYPES, read_header
from lopt_lite.errors import ModelError


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_says_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros((2, 3), dtype=dtype) for name, dtype in DTYPES.items() if dtype.itemsize in (1, 2, 4, 8)
    }
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.zeros((0, 4))
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == path.stat().st_size
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in header.tensors.items()} == {
        n: (t.dtype, tuple(t.shape), t.nbytes) for n, t in tensors.items()
    }
    assert max(info.end for info in header.tensors.values()) == header.file_bytes


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode().ljust(0x0280)
    path = write(tmp_path / "m.safetensors", text, b"\0" * 8)
    assert path.read_bytes().startswith(b"\x80\x02")
    assert read_header(path).tensors["a"].shape == (2,)


HOSTILE = {
    "not JSON": (b"{nonsense", b""),
    "truncated JSON": (b'{"a": {"dtype"', b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "NaN": (b'{"__metadata__": NaN}', b""),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b""),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "a list": ([1, 2], b""),
    "leading space": (b' {"a": 1}', b""),
    "repeated name": (b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(entry()).encode()}, b"\0" * 8),
    "repeated key": (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
    "lone surrogate": (b'{"\\ud800": %s}' % json.dumps(entry()).encode(), b"\0" * 8),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "metadata list": ({"__metadata__": []}, b""),
    "entry is a number": ({"a": 3}, b""),
    "entry lacks shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "entry has more": ({"a": {**entry(), "strides": [9]}}, b"\0" * 8),
    "unknown type": ({"a": entry(dtype="F31")}, b"\0" * 8),
    "type is a list": ({"a": entry(dtype=["F32"])}, b"\0" * 8),
    "shape is a number": ({"a": entry(shape=2)}, b"\0" * 8),
    "negative shape": ({"a": entry(shape=[-2])}, b"\0" * 8),
    "two negatives": ({"a": entry(shape=[-1, -2])}, b"\0" * 8),
    "shape of floats": ({"a": entry(shape=[2.0])}, b"\0" * 8),
    "shape of booleans": ({"a": entry(shape=[True, 2])}, b"\0" * 8),
    "many dimensions": ({"a": entry(shape=[1] * 65, offsets=[0, 4])}, b"\0" * 4),
    "product overflow": ({"a": entry(shape=[2**40, 2**40], offsets=[0, 8])}, b"\0" * 8),
    "product wraps to zero": ({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, b""),
    "overflow hidden by zero": ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b""),
    "one offset": ({"a": entry(offsets=[8])}, b"\0" * 8),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, b"\0" * 8),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, b"\0" * 8),
    "offsets of text": ({"a": entry(offsets=["0", "8"])}, b"\0" * 8),
    "out of file": ({"a": entry(shape=[4], offsets=[0, 16])}, b"\0" * 8),
    "far out of file": ({"a": entry(shape=[2**50], offsets=[0, 2**52])}, b"\0" * 8),
    "too few bytes for the shape": ({"a": entry(shape=[3])}, b"\0" * 8),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12),
    "same place": ({"a": entry(), "b": entry()}, b"\0" * 8),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, b"\0" * 12),
    "trailing bytes": ({"a": entry()}, b"\0" * 9),
    "no tensors but bytes": ({}, b"\0" * 8),
    "truncated": ({"a": entry()}, b"\0" * 7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_naming_the_file(tmp_path: Path, name: str) -> None:
    header, data = HOSTILE[name]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0", b"\x02\0\0\0\0\0\0\0", b"\0" * 64, b"{}" * 40])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("claim", [10**8 + 1, 2**60, 2**64 - 1, 1000])
def test_a_header_length_beyond_the_file_or_the_limit_is_refused(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(claim.to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(ModelError, match="claims a header"):
        read_header(path)


def test_other_kinds_of_file_are_named_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"PyTorch(.|\n)*pickles can run code"):
        read_header(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    with pytest.raises(ModelError, match=r"pickles can run code and are never loaded"):
        read_header(path)
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"weight": [1.0] * 50}, protocol=protocol))
        with pytest.raises(ModelError, match="pickle"):
            read_header(path)
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 100)
    with pytest.raises(ModelError, match="GGUF"):
        read_header(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ModelError, match="Git LFS"):
        read_header(path)


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        read_header(tmp_path / "absent.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(ModelError, match="not a regular file"):
            read_header(tmp_path / "pipe.safetensors")


VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, {"format": "pt"})


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_are_refused_or_leave_every_tensor_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    content = bytearray(VALID)
    for place, value in edits:
        content[place] = value
    _refused_or_sound(tmp_path_factory, bytes(content))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(VALID) - 1))
def test_a_cut_file_is_always_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(VALID[:length])
    with pytest.raises(ModelError):
        read_header(path)


_NUMBERS = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**63, 2**64, -(2**63)]), st.just(1.5), st.none())
_ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "X"]),
            "shape": st.lists(_NUMBERS, max_size=3),
            "data_offsets": st.lists(_NUMBERS, min_size=2, max_size=2),
        }
    ),
)


@settings(max_examples=300, deadline=None)
@given(entries=_ENTRIES, data=st.binary(max_size=24))
def test_made_up_headers_are_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, object], data: bytes
) -> None:
    text = json.dumps(entries).encode()
    _refused_or_sound(tmp_path_factory, len(text).to_bytes(8, "little") + text + data)


def _refused_or_sound(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelError:
        return
    data_start = 8 + int.from_bytes(content[:8], "little")
    position = data_start
    for info in header.tensors.values():
        assert info.start == position
        count = 1
        for size in info.shape:
            count *= size
        assert info.nbytes == count * info.dtype.itemsize
        position = info.end
    assert position == len(content)
