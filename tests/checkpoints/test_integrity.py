"""A file that does not hold what was written is noticed when it is first used, and a store's shard is made again."""

from __future__ import annotations

import hashlib
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
from lopt_lite.checkpoints.store import EMBEDDING_SHARD, HEAD_SHARD, Store, layer_shard
from lopt_lite.checkpoints.store_tensors import StoreTensors
from lopt_lite.errors import LoptError, ModelError
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
