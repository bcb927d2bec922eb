"""A file that does not hold what was written is noticed when it is first used, and a store's shard is made again."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import QuantizeSettings, files
from lopt_lite.checkpoints import integrity
from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.integrity import CheckedFiles, DamagedFileError, check_file, sha256_of
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import (
    EMBEDDING_SHARD,
    HEAD_SHARD,
    INDEX_NAME,
    layer_shard,
    standing_store,
    store_info,
)
from lopt_lite.checkpoints.store_tensors import StoreTensors
from lopt_lite.errors import LoptError, ModelError, RunDirectoryError
from lopt_lite.events import Event, Notice, Progress
from tests.damage import flip_a_byte
from tests.rig import CPU
from tests.tiny_models import make_model

_SHARDS = (EMBEDDING_SHARD, layer_shard(0), layer_shard(2), HEAD_SHARD)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its store."""
    directory = tmp_path_factory.mktemp("sound")
    model = make_model(directory / "model")
    _builder(model, directory / "store").build()
    return model, directory / "store"


@pytest.fixture
def store(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the store, to damage."""
    return shutil.copytree(sound[1], tmp_path / "store")


def _builder(model: Path, store: Path, **more: Any) -> StoreBuilder:
    return StoreBuilder(locate_model(str(model)), store, quantize="nf4", dtype="bfloat16", device=CPU, **more)


def _read_everything(store: Store, skeleton: Skeleton | None = None) -> None:
    if skeleton is None:
        skeleton = Skeleton(locate_model(str(store.directory)), dtype=torch.bfloat16)
    store.embedding_rows(skeleton, torch.tensor([1, 5]))
    store.root(skeleton)
    store.head(skeleton)
    for index in range(skeleton.layer_count):
        store.layer(skeleton, index)
        view = store.layer_view(skeleton, index)
        view.read_into(torch.empty(view.nbytes, dtype=torch.uint8))
    view = store.head_view(skeleton, 0, 7)
    view.read_into(torch.empty(view.nbytes, dtype=torch.uint8))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is really read to be hashed."""
    counted: Counter[str] = Counter()

    class Counted:
        def __init__(self) -> None:
            self._digest = hashlib.sha256()
            counted["files"] += 1

        def __getattr__(self, name: str) -> Any:
            return getattr(self._digest, name)

    monkeypatch.setattr(integrity, "hashlib", SimpleNamespace(sha256=Counted))
    return counted


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 3])
def test_the_sha256_is_that_of_the_whole_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_hashing_holds_a_small_piece_of_the_file_in_memory(tmp_path):
    (tmp_path / "file").write_bytes(bytes(16 << 20))
    tracemalloc.start()
    sha256_of(tmp_path / "file")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 << 20


def test_a_file_is_hashed_once_until_it_changes(tmp_path, hashed):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    expected = sha256_of(path)
    for _ in range(3):
        check_file(path, expected, fix="nothing")
    assert hashed["files"] == 1
    flip_a_byte(path)
    with pytest.raises(DamagedFileError):
        check_file(path, expected, fix="nothing")
    assert hashed["files"] == 2


def test_the_error_names_the_file_what_was_expected_and_what_to_do(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    expected = sha256_of(path)
    flip_a_byte(path)
    with pytest.raises(ModelError) as caught:
        check_file(path, expected, fix="fetch it again")
    assert str(path) in caught.value.found
    assert hashlib.sha256(path.read_bytes()).hexdigest() in caught.value.found
    assert expected in caught.value.expected
    assert (caught.value.fix, caught.value.exit_code) == ("fetch it again", 3)
    path.unlink()
    with pytest.raises(DamagedFileError, match="file is missing") as caught:
        check_file(path, expected, fix="fetch it again")
    assert expected in caught.value.expected


def test_a_long_check_shows_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "SILENT_S", 0.0)
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    told: list[Event] = []
    check_file(path, hashlib.sha256(bytes(3 << 20)).hexdigest(), fix="", on_event=told.append)
    assert told == [Progress(task="checking file", done=n, total=3, unit="MiB") for n in (1, 2, 3)]


def test_many_threads_hash_a_file_once_and_all_wait_for_it(tmp_path, hashed):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    checked = CheckedFiles({path: hashlib.sha256(bytes(1 << 20)).hexdigest()}, fix="")
    threads = [threading.Thread(target=checked.check, args=(path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashed["files"] == 1


def test_what_is_repaired_is_compared_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"bad")
    checked = CheckedFiles({path: hashlib.sha256(b"good").hexdigest()}, fix="", repair=lambda p: None)
    with pytest.raises(DamagedFileError):
        checked.check(path)
    checked = CheckedFiles(
        {path: hashlib.sha256(b"good").hexdigest()}, fix="", repair=lambda p: files.write_bytes(p, b"good")
    )
    checked.check(path)


# -- the store --------------------------------------------------------------------------------------------------------


def test_a_sound_store_is_hashed_once_per_shard_by_all_that_read_it(sound, store, hashed):
    opened = Store(store)
    assert hashed["files"] == 0
    _read_everything(opened)
    opened.close()
    _read_everything(opened)
    overlay = opened.overlaid([])
    _read_everything(overlay)
    _read_everything(Store(store))
    assert hashed["files"] == len(opened.info.shards)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "a byte of the data": flip_a_byte,
    "a byte of the header": lambda path: flip_a_byte(path, at=30),
    "the header's length": lambda path: flip_a_byte(path, at=1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "missing": Path.unlink,
}


def _rename_a_tensor(path: Path) -> None:
    """A header that is sound by itself, but speaks of another tensor."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'weight"', b'weighs"', 1))


@pytest.mark.parametrize("shard", _SHARDS)
@pytest.mark.parametrize("damage", [*_DAMAGES.values(), _rename_a_tensor], ids=[*_DAMAGES, "a tensor's name"])
def test_damage_is_noticed_and_the_shard_named(sound, store, shard, damage):
    damage(store / shard)
    with pytest.raises(DamagedFileError) as caught:
        _read_everything(Store(store))
    assert str(store / shard) in caught.value.found
    assert f"lopt-lite quantize {sound[0]} {store} --quantize nf4" in caught.value.fix


@pytest.mark.parametrize("shard", _SHARDS)
@pytest.mark.parametrize("damage", [*_DAMAGES.values(), _rename_a_tensor], ids=[*_DAMAGES, "a tensor's name"])
def test_a_damaged_shard_is_made_again_with_the_same_bytes_and_no_other(sound, store, shard, damage):
    model, original = sound
    damage(store / shard)
    others = {p.name: p.stat().st_ino for p in store.glob("*.safetensors") if p.name != shard}
    told: list[Event] = []
    builder = _builder(model, store, on_event=told.append)
    assert not builder.build()
    _read_everything(Store(store, repair=builder.rebuild))
    for path in original.glob("*.safetensors"):
        assert (store / path.name).read_bytes() == path.read_bytes()
    assert {p.name: p.stat().st_ino for p in store.glob("*.safetensors") if p.name != shard} == others
    (notice,) = [event for event in told if isinstance(event, Notice) and "made again" in event.text]
    assert str(store / shard) in notice.text
    assert str(model) in notice.text


def test_a_header_that_was_wrong_in_a_way_that_fits_is_not_believed_after_the_repair(sound, store):
    """Types are not in the index; a tensor that was taken for another type must not be read as such."""
    skeleton = Skeleton(locate_model(str(store)), dtype=torch.bfloat16)
    path = store / layer_shard(1)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"U8"', b'"I8"', 1))
    opened = Store(store, repair=_builder(sound[0], store).rebuild)
    with pytest.raises(DamagedFileError, match="has been made again") as caught:
        _read_everything(opened, skeleton)
    assert caught.value.fix == "give the same command again"
    _read_everything(Store(store))


def test_a_shard_that_another_process_has_made_again_is_left_alone(sound, store):
    told: list[Event] = []
    before = (store / layer_shard(1)).stat()
    _builder(sound[0], store, on_event=told.append).rebuild(layer_shard(1))
    after = (store / layer_shard(1)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert told == []


def test_a_shard_that_comes_out_otherwise_is_refused(sound, store, monkeypatch):
    flip_a_byte(store / layer_shard(1))
    builder = _builder(sound[0], store)
    make = StoreTensors.of
    monkeypatch.setattr(StoreTensors, "of", lambda *args: ((n, torch.zeros_like(t)) for n, t in make(*args)))
    with pytest.raises(ModelError, match=r"layer-00001.* now has the sha256") as caught:
        _read_everything(Store(store, repair=builder.rebuild))
    assert "delete" in caught.value.fix
    with pytest.raises(DamagedFileError):
        _read_everything(Store(store))


def test_a_shard_is_not_made_from_another_model(sound, store, tmp_path):
    flip_a_byte(store / layer_shard(1))
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(LoptError, match="was made with model"):
        _read_everything(Store(store, repair=_builder(other, store).rebuild))


def test_quantizing_again_checks_every_shard_and_mends_it(sound, store):
    model, original = sound
    settings = QuantizeSettings(model=str(model), store=str(store), device="cpu")
    flip_a_byte(store / layer_shard(3))
    told: list[Event] = []
    assert lopt_lite.quantize(settings, on_event=told.append).already_done
    assert (store / layer_shard(3)).read_bytes() == (original / layer_shard(3)).read_bytes()
    assert [event for event in told if isinstance(event, Notice)]


# -- the store's index ------------------------------------------------------------------------------------------------


def _own(index: dict[str, Any]) -> dict[str, Any]:
    return index["metadata"]["lopt_lite"]


def _drop_shard(index: dict[str, Any], *names: str) -> None:
    """As if the model had no such part: neither the shard is listed nor its tensors."""
    for name in names:
        del _own(index)["shards"][name]
    index["weight_map"] = {t: n for t, n in index["weight_map"].items() if n not in names}


def _each_shard(index: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    for record in _own(index)["shards"].values():
        change(record)


def _one_more_layer(index: dict[str, Any]) -> None:
    _own(index)["layers"] += 1


_SHA256 = "0" * 64

_BAD_INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda i: i["metadata"].update(lopt_lite={"version": 1}), "too little or too much"),
    "a strange word": (lambda i: _own(i).update(colour="blue"), "too little or too much: colour"),
    "a version of truth": (lambda i: _own(i).update(version=True), "version is True"),
    "shards of numbers": (lambda i: _own(i).update(shards={"x": 5}), "of the shard 'x' it says 5"),
    "shards in a list": (lambda i: _own(i).update(shards=[1]), r"shards is \[1\]"),
    "no shards": (lambda i: _own(i).update(shards={}), "lists 0 shards"),
    "nothing at all": (lambda i: (_own(i).update(shards={}), i.update(weight_map={})), "lists 0 shards"),
    "shards without a size": (lambda i: _each_shard(i, lambda r: r.pop("bytes")), "of the shard"),
    "shards of a size in text": (lambda i: _each_shard(i, lambda r: r.update(bytes="5")), "of the shard"),
    "shards of less than nothing": (lambda i: _each_shard(i, lambda r: r.update(bytes=-5)), "of the shard"),
    "shards without a sha256": (lambda i: _each_shard(i, lambda r: r.pop("sha256")), "of the shard"),
    "shards with a number as sha256": (lambda i: _each_shard(i, lambda r: r.update(sha256=5)), "of the shard"),
    "shards with a short sha256": (lambda i: _each_shard(i, lambda r: r.update(sha256="ab")), "of the shard"),
    "a shard outside": (
        lambda i: _own(i)["shards"].update({"../model.safetensors": {"bytes": 1, "sha256": _SHA256}}),
        "../model.safetensors",
    ),
    "a layer too many": (
        lambda i: _own(i)["shards"].update({layer_shard(4): {"bytes": 1, "sha256": _SHA256}}),
        "layer-00004",
    ),
    "a layer's number in other words": (
        lambda i: _own(i)["shards"].update({"layer-000001.safetensors": {"bytes": 1, "sha256": _SHA256}}),
        "layer-000001",
    ),
    "a layer too few": (lambda i: _drop_shard(i, layer_shard(2)), "lists 5 shards"),
    "no head": (lambda i: _drop_shard(i, HEAD_SHARD), "lists 5 shards"),
    "a shard that holds nothing": (
        lambda i: i.update(weight_map={t: n for t, n in i["weight_map"].items() if n != layer_shard(1)}),
        "do not agree on .*layer-00001",
    ),
    "tensors of no shard": (lambda i: i["weight_map"].update(a="b.safetensors"), "do not agree on .*b.safetensors"),
    "a weight_map in a list": (lambda i: i.update(weight_map=[1]), "no sound weight_map"),
    "a weight_map to numbers": (lambda i: i["weight_map"].update(a=5), "no sound weight_map"),
    "no weight_map": (lambda i: i.pop("weight_map"), "no sound weight_map"),
    "a fingerprint of numbers": (lambda i: _own(i).update(model_fingerprint=5), "model_fingerprint is 5"),
    "a source of nothing": (lambda i: _own(i).update(source=None), "source is None"),
    "layers in words": (lambda i: _own(i).update(layers="x"), "layers is 'x'"),
    "layers of truth": (lambda i: _own(i).update(layers=True), "layers is True"),
    "no layers": (lambda i: _own(i).update(layers=0), "layers is 0"),
    "more layers": (_one_more_layer, "of a model of 5 layers"),
    "layers without end": (lambda i: _own(i).update(layers=10**12), "of a model of 1000000000000 layers"),
    "a strange kind": (lambda i: _own(i).update(quantize="zip"), "quantize is 'zip'"),
    "a kind that is a list": (lambda i: _own(i).update(quantize=["nf4"]), "quantize is"),
    "a strange dtype": (lambda i: _own(i).update(dtype="int8"), "dtype is 'int8'"),
    "numbers unquantised": (lambda i: _own(i).update(unquantized=[5]), r"unquantized is \[5\]"),
    "text unquantised": (lambda i: _own(i).update(unquantized="mlp"), "unquantized is 'mlp'"),
}


def _change_index(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((store / INDEX_NAME).read_text())
    change(content)
    (store / INDEX_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize("damage", _BAD_INDICES)
def test_an_index_that_makes_no_sense_is_damaged_and_made_again(sound, store, damage):
    model, original = sound
    change, match = _BAD_INDICES[damage]
    _change_index(store, change)
    for read in (store_info, Store):
        with pytest.raises(ModelError, match=match) as caught:
            read(store)
        assert f"{store / INDEX_NAME} is damaged" in caught.value.found
        assert caught.value.expected and caught.value.fix == "make the store again"
    assert standing_store(store) is None
    lopt_lite.quantize(QuantizeSettings(model=str(model), store=str(store), device="cpu"))
    assert (store / INDEX_NAME).read_bytes() == (original / INDEX_NAME).read_bytes()


def test_a_store_of_another_version_is_no_damage(store):
    _change_index(store, lambda index: _own(index).update(version=2, shards=5))
    with pytest.raises(RunDirectoryError, match="unknown format"):
        standing_store(store)


def test_an_index_of_some_layers_alone_is_made_again_for_whom_needs_the_whole(sound, store):
    model, original = sound
    _change_index(store, lambda index: _drop_shard(index, EMBEDDING_SHARD, HEAD_SHARD, layer_shard(0)))
    assert standing_store(store) is not None
    outcome = lopt_lite.quantize(QuantizeSettings(model=str(model), store=str(store), device="cpu"))
    assert not outcome.already_done and outcome.shards == 6
    assert (store / INDEX_NAME).read_bytes() == (original / INDEX_NAME).read_bytes()


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {}),
        ("llama", {"layers": range(1, 3)}),
        ("llama", {"layers": range(3, 4)}),
        ("llama", {"transform": lambda name, tensor: tensor * 2, "transform_fingerprint": "twice"}),
        ("llama-tied", {}),
        ("llama-tied", {"untie": True}),
        ("gpt2", {}),
        ("opt", {}),
        ("mixtral", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "whole",
)
def test_stores_of_all_kinds_are_sound(tmp_path, architecture, more):
    builder = _builder(make_model(tmp_path / "model", architecture), tmp_path / "store", **more)
    assert builder.build()
    opened = Store(tmp_path / "store")
    opened.check()
    opened.close()
    info = store_info(tmp_path / "store")
    assert info.layers == 4 and len(info.shards) == (len(more["layers"]) if "layers" in more else 6)
    if "transform" not in more:
        assert not builder.build()
