"""Reading tensors: the oracle is the safetensors library."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lopt_lite.checkpoints.header import DTYPES, read_header
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError


def open_files(*paths: Path) -> TensorFiles:
    headers = [read_header(path) for path in paths]
    return TensorFiles({name: header for header in headers for name in header.tensors})


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{name}": torch.randint(0, 2, (5, 3), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors["embed"] = torch.randn((40, 7), generator=generator).to(torch.bfloat16)
    tensors["cube"] = torch.randn((6, 2, 3), generator=generator)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["nothing"] = torch.zeros((0, 4))
    tensors["thin"] = torch.zeros((4, 0))
    return tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(example(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_read_equals_the_library(path: Path) -> None:
    expected = load_file(path)
    with open_files(path) as files:
        assert set(files.names()) == set(expected)
        assert len(files) == len(expected)
        assert files.total_bytes == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in expected.items():
            assert name in files
            assert files.file_of(name) == path
            assert same(files.read(name), tensor)


def test_read_gives_memory_of_its_own(path: Path) -> None:
    files = open_files(path)
    files.read("embed").fill_(0)
    assert same(files.read("embed"), load_file(path)["embed"])


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(0, 39), max_size=60))
def test_read_rows_equals_indexing(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    if not path.exists():
        save_file(example(), path)
    expected = load_file(path)["embed"]
    with open_files(path) as files:
        wanted = torch.tensor(rows, dtype=torch.int64)
        assert same(files.read_rows("embed", wanted), expected[wanted])


def test_rows_of_any_type_and_shape(path: Path) -> None:
    expected = load_file(path)
    files = open_files(path)
    rows = torch.tensor([4, 0, 0, 3])
    for name in [*(f"t.{name}" for name in DTYPES), "cube"]:
        assert same(files.read_rows(name, rows), torch.stack([expected[name][int(row)] for row in rows]))
        assert same(files.read_range(name, 1, 4), expected[name][1:4])
    assert files.read_rows("thin", torch.tensor([0, 2])).shape == (2, 0)
    assert files.read_range("nothing", 0, 0).shape == (0, 4)
    assert files.read_range("embed", 40, 40).shape == (0, 7)


@pytest.mark.parametrize("row", [-1, 40, 2**62, -(2**63)])
def test_rows_outside_the_tensor_are_refused(path: Path, row: int) -> None:
    files = open_files(path)
    with pytest.raises(ModelError, match="has 40 rows"):
        files.read_rows("embed", torch.tensor([0, row]))


def test_wrong_requests_are_refused(path: Path) -> None:
    files = open_files(path)
    with pytest.raises(ModelError, match="no tensor 'absent'"):
        files.read("absent")
    for first, end in ((0, 41), (-1, 3), (5, 4)):
        with pytest.raises(ModelError, match="rows"):
            files.read_range("embed", first, end)
    with pytest.raises(ModelError, match="single number"):
        files.read_range("scalar", 0, 1)
    with pytest.raises(ModelError, match="has 0 rows"):
        files.read_rows("nothing", torch.tensor([0]))
    with pytest.raises(ValueError, match="int64"):
        files.read_rows("embed", torch.tensor([0.0]))
    with pytest.raises(ValueError, match="int64"):
        files.read_rows("embed", torch.tensor([[0]]))


def test_a_file_changed_or_cut_in_use_is_an_error_naming_it(path: Path) -> None:
    files = open_files(path)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(ModelError, match=r"model\.safetensors had"):
        files.read("embed")
    path.write_bytes(content)
    files.read("scalar")
    with path.open("r+b") as file:
        file.truncate(len(content) // 2)
    with pytest.raises(ModelError, match=r"model\.safetensors ended"):
        for name in files.names():
            files.read(name)


def test_a_removed_file_is_an_error_and_closing_allows_reading_again(path: Path) -> None:
    files = open_files(path)
    files.read("embed")
    files.close()
    assert same(files.read("embed"), load_file(path)["embed"])
    files.close()
    path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        files.read("embed")


def test_threads_may_read_at_once(path: Path) -> None:
    files, expected = open_files(path), load_file(path)
    wrong: list[str] = []

    def read(name: str) -> None:
        for _ in range(50):
            if not same(files.read(name), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in ("embed", "cube", "t.F32")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_fingerprint_ignores_names_of_files_and_sharding(tmp_path: Path) -> None:
    tensors = example()
    names = list(tensors)
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "x.safetensors", metadata={"any": "thing"})
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "y.safetensors")
    whole = open_files(tmp_path / "one.safetensors").fingerprint()
    assert open_files(tmp_path / "y.safetensors", tmp_path / "x.safetensors").fingerprint() == whole


@pytest.mark.parametrize("place", [0, 25_000, 49_999])
def test_the_fingerprint_changes_with_the_weights(tmp_path: Path, place: int) -> None:
    tensor = torch.zeros(50_000)
    save_file({"a": tensor}, tmp_path / "before.safetensors")
    before = open_files(tmp_path / "before.safetensors").fingerprint()
    tensor[place] = 1
    save_file({"a": tensor}, tmp_path / "after.safetensors")
    assert open_files(tmp_path / "after.safetensors").fingerprint() != before


def test_the_fingerprint_changes_with_name_type_and_shape(tmp_path: Path) -> None:
    variants = [
        {"a": torch.zeros(4, 2)},
        {"b": torch.zeros(4, 2)},
        {"a": torch.zeros(2, 4)},
        {"a": torch.zeros(4, 2, dtype=torch.int32)},
        {"a": torch.zeros(4, 2), "b": torch.zeros(0)},
    ]
    prints = set()
    for number, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        prints.add(open_files(tmp_path / f"{number}.safetensors").fingerprint())
    assert len(prints) == len(variants)
