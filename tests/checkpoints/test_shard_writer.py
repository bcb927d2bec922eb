"""The streaming safetensors writer: what it writes, the library reads."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lopt_lite.checkpoints.header import DTYPES, read_header
from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order, write_shard
from lopt_lite.errors import RunDirectoryError


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return aligned_order(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def in_order(specs: list[TensorSpec], tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((spec.name, tensors[spec.name]) for spec in specs)


def check_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(
            loaded[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )
    header = read_header(path)
    data_start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert data_start % 16 == 0
    for info in header.tensors.values():
        assert info.start % info.dtype.itemsize == 0
        if info.nbytes >= 16 and info.nbytes % 16 == 0:
            assert info.start % 16 == 0
            assert (info.start - data_start) % 16 == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12
    )
)
def test_what_is_written_loads_with_the_library_and_is_aligned(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]]
) -> None:
    tensors = {
        f"tensor {number} ü": torch.randint(0, 2, shape).to(DTYPES[dtype])
        for number, (dtype, shape) in enumerate(kinds)
    }
    specs = specs_of(tensors)
    path = tmp_path_factory.getbasetemp() / "shard.safetensors"
    record = write_shard(path, specs, in_order(specs, tensors), {"made by": "tests"})
    check_file(path, tensors)
    assert record.name == "shard.safetensors"
    assert record.bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.tensors == tuple(spec.name for spec in specs)


def test_metadata_is_what_transformers_looks_for_unless_given(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.float32, (1,))
    path = tmp_path / "a.safetensors"
    write_shard(path, [spec], [("a", torch.ones(1))])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    write_shard(path, [spec], [("a", torch.ones(1))], {"x": "y"})
    assert read_header(path).metadata == {"x": "y"}


def test_views_and_parameters_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.t(), "strided": base[:, ::2], "parameter": torch.nn.Parameter(base)}
    specs = specs_of(tensors)
    write_shard(tmp_path / "a.safetensors", specs, in_order(specs, tensors))
    check_file(tmp_path / "a.safetensors", tensors)


def test_only_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    specs = [TensorSpec(str(number), torch.float32, (64,)) for number in range(5)]
    earlier: list[weakref.ref[torch.Tensor]] = []

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        for spec in specs:
            assert all(reference() is None for reference in earlier[:-1])
            tensor = torch.zeros(spec.shape)
            earlier.append(weakref.ref(tensor))
            yield spec.name, tensor
            del tensor

    write_shard(tmp_path / "a.safetensors", specs, make())
    assert len(earlier) == 5


def test_an_order_that_misaligns_is_refused(tmp_path: Path) -> None:
    specs = [TensorSpec("odd", torch.uint8, (3,)), TensorSpec("big", torch.float32, (4,))]
    with pytest.raises(ValueError, match="aligned_order"):
        write_shard(tmp_path / "a.safetensors", specs, [])
    assert [spec.name for spec in aligned_order(specs)] == ["big", "odd"]


@pytest.mark.parametrize(
    "given_tensors",
    [
        [],
        [("a", torch.zeros(4))],
        [("b", torch.zeros(4)), ("a", torch.zeros(4))],
        [("a", torch.zeros(4)), ("b", torch.zeros(5))],
        [("a", torch.zeros(4)), ("b", torch.zeros(4, dtype=torch.int32))],
        [("a", torch.zeros(4)), ("b", torch.zeros(4)), ("c", torch.zeros(4))],
    ],
)
def test_tensors_that_do_not_match_their_specs_leave_no_file(
    tmp_path: Path, given_tensors: list[tuple[str, torch.Tensor]]
) -> None:
    specs = [TensorSpec("a", torch.float32, (4,)), TensorSpec("b", torch.float32, (4,))]
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.safetensors", specs, given_tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
def test_impossible_names_are_refused(tmp_path: Path, names: list[str]) -> None:
    specs = [TensorSpec(name, torch.float32, (4,)) for name in names]
    with pytest.raises(ValueError, match="listed twice"):
        write_shard(tmp_path / "a.safetensors", specs, [(name, torch.zeros(4)) for name in names])


def test_a_missing_directory_is_explained(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.float32, (1,))
    with pytest.raises(RunDirectoryError, match="cannot write"):
        write_shard(tmp_path / "absent" / "a.safetensors", [spec], [("a", torch.ones(1))])
