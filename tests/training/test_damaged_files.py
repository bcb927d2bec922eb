"""A run whose files were damaged meanwhile makes them again and ends with the same bytes, or says which to replace."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
from lopt_lite import EvaluateSettings, ExportSettings, TrainSettings
from lopt_lite.checkpoints import integrity
from lopt_lite.checkpoints.integrity import DamagedFileError, UnreadableFileError
from lopt_lite.checkpoints.store_index import EMBEDDING_SHARD, HEAD_SHARD, layer_shard
from lopt_lite.errors import RunDirectoryError, StoppedError
from lopt_lite.events import BlockStarted, Event, Notice, Step
from lopt_lite.journal import read_facts
from lopt_lite.training import activation_cache, memory_choice, sequential
from lopt_lite.training import run as training_run
from tests.damage import flip_a_byte
from tests.rig import residence
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model

_BLOCKS = 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several batches and shards, and sums in one order."""
    monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 8 << 10)
    monkeypatch.setattr(sequential, "FORWARD_ROWS", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model"), make_data(directory / "data.jsonl", 24)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    values = {"blocks": _BLOCKS, "batch_size": 4, "epochs": 2, "dtype": "float32", "head_fit_epochs": 0}
    values |= {**EVERY_BLOCK_LEARNS, **changes}
    return TrainSettings(model=str(inputs[0]), data=str(inputs[1]), output=str(output), device="cpu", **values)


def _train_until(settings: TrainSettings, *, block: int, step: int) -> None:
    """Train, and stop after ``step`` steps of ``block`` (0: when it begins)."""

    def stop(event: Event) -> None:
        begins = isinstance(event, BlockStarted) and event.block == block and step == 0
        if begins or (isinstance(event, Step) and (event.block, event.step) == (block, step)):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        lopt_lite.train(settings, on_event=stop)


def _train(settings: TrainSettings) -> list[str]:
    told: list[Event] = []
    lopt_lite.train(settings, on_event=told.append)
    return [event.text for event in told if isinstance(event, Notice)]


def _results(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for part in ("adapter", "model") for p in (run / part).glob("*")}


def _said_of(texts: list[str], path: Path) -> list[str]:
    return [text for text in texts if str(path) in text]


@pytest.fixture(scope="module")
def reference(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run whose files stayed sound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_cache, "_SHARD_BYTES", 8 << 10)
        patch.setattr(sequential, "FORWARD_ROWS", 3)
        torch.set_num_threads(1)
        run = tmp_path_factory.mktemp("reference") / "run"
        _train(_settings(inputs, run))
    return _results(run)


# -- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dequantised", "streamed"])
@pytest.mark.parametrize("shard", [EMBEDDING_SHARD, layer_shard(0), layer_shard(3), HEAD_SHARD])
def test_a_damaged_shard_of_the_store_is_made_again(inputs, tmp_path, reference, monkeypatch, shard, mode):
    settings = _settings(inputs, tmp_path / "run")
    chosen = residence(mode, layers=4)
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)
    _train_until(settings, block=0, step=0)
    path = tmp_path / "run" / "store" / shard
    flip_a_byte(path)
    texts = _train(settings)
    (text,) = _said_of(texts, path)
    assert "is made again from" in text
    assert _results(tmp_path / "run") == reference


def test_a_truncated_shard_of_a_shared_store_is_made_again(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run", store=str(tmp_path / "shared"))
    _train_until(settings, block=1, step=1)
    path = tmp_path / "shared" / layer_shard(2)
    os.truncate(path, path.stat().st_size // 2)
    assert len(_said_of(_train(settings), path)) == 1
    assert _results(tmp_path / "run") == reference


def test_a_damaged_shard_of_a_model_that_is_a_store_is_an_error(inputs, tmp_path):
    store = tmp_path / "store"
    lopt_lite.quantize(lopt_lite.QuantizeSettings(model=str(inputs[0]), store=str(store), device="cpu"))
    flip_a_byte(store / layer_shard(1))
    with pytest.raises(DamagedFileError) as caught:
        _train(_settings((store, inputs[1]), tmp_path / "run"))
    assert str(store / layer_shard(1)) in caught.value.found
    assert caught.value.exit_code == 3
    assert "lopt-lite quantize" in caught.value.fix


# -- what a run leaves on its way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda path: os.truncate(path, 100)])
@pytest.mark.parametrize(("block", "step"), [(1, 2), (2, 2)])
def test_damaged_inputs_of_a_block_are_computed_again(inputs, tmp_path, reference, block, step, damage):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=block, step=step)
    shards = sorted((tmp_path / "run" / "cache" / f"block-{block:02d}").iterdir())
    assert len(shards) > 3
    before = {path: path.read_bytes() for path in shards}
    damaged = [shards[1], shards[-1]]
    for path in damaged:
        damage(path)
    seen: dict[Path, bytes] = {}
    told: list[Event] = []

    def on_event(event: Event) -> None:
        told.append(event)
        if isinstance(event, BlockStarted) and event.block == block:
            seen.update({path: path.read_bytes() for path in shards})

    lopt_lite.train(settings, on_event=on_event)
    assert seen == before
    texts = [event.text for event in told if isinstance(event, Notice)]
    assert all("computed again" in text for path in damaged for text in _said_of(texts, path))
    assert [len(_said_of(texts, path)) for path in damaged] == [1, 1]
    assert _results(tmp_path / "run") == reference
    assert not (tmp_path / "run" / "cache" / "block-01").exists()


def test_a_run_that_is_stopped_while_it_computes_inputs_again_goes_on(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=2, step=1)
    shards = sorted((tmp_path / "run" / "cache" / "block-02").iterdir())
    for path in shards[1:]:
        flip_a_byte(path)

    for attempt in range(1, 30):
        outputs: list[Event] = []

        def stop(event: Event, outputs: list[Event] = outputs, attempt: int = attempt) -> None:
            if getattr(event, "task", "").startswith("outputs of block"):
                outputs.append(event)
                if len(outputs) == attempt:
                    os.kill(os.getpid(), signal.SIGINT)

        try:
            lopt_lite.train(settings, on_event=stop)
        except StoppedError:
            continue
        break
    assert attempt > 3
    assert _results(tmp_path / "run") == reference


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda path: os.truncate(path, 100)])
def test_after_a_damaged_checkpoint_the_block_starts_again(inputs, tmp_path, reference, damage):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=1, step=5)
    (path,) = (tmp_path / "run" / "blocks" / "block-01" / "checkpoint").iterdir()
    fact = next(f for f in reversed(read_facts(tmp_path / "run" / "journal.jsonl")[0]) if f["fact"] == "checkpoint")
    assert integrity.sha256_of(path) == fact["sha256"]
    damage(path)
    told: list[Event] = []
    lopt_lite.train(settings, on_event=told.append)
    (text,) = _said_of([event.text for event in told if isinstance(event, Notice)], path)
    assert "block 2 is trained again from its start" in text
    assert [event.step for event in told if isinstance(event, BlockStarted)] == [0, 0]
    assert _results(tmp_path / "run") == reference


def _adapter_of(run: Path, block: int) -> Path:
    return run / "blocks" / f"block-{block:02d}" / "adapter.safetensors"


@pytest.mark.parametrize(
    ("of_blocks", "damage"), [([0], flip_a_byte), ([1], Path.unlink), ([0, 1], lambda path: os.truncate(path, 100))]
)
def test_a_block_whose_adapter_was_damaged_is_trained_again(inputs, tmp_path, reference, of_blocks, damage):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=2, step=2)
    for block in of_blocks:
        damage(_adapter_of(tmp_path / "run", block))
    told: list[Event] = []
    lopt_lite.train(settings, on_event=told.append)
    texts = [event.text for event in told if isinstance(event, Notice)]
    for block in of_blocks:
        assert f"block {block + 1} is trained again" in _said_of(texts, _adapter_of(tmp_path / "run", block))[0]
    assert [e.block for e in told if isinstance(e, BlockStarted)] == [*of_blocks, 2]
    # What block 3 has learned is not lost.
    assert [e.step for e in told if isinstance(e, BlockStarted)][-1] == 2
    assert _results(tmp_path / "run") == reference
    assert not list((tmp_path / "run" / "cache").glob("block-*"))


def test_a_block_that_cannot_be_read_is_not_trained_again(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=2, step=2)
    path = _adapter_of(tmp_path / "run", 0)
    # A directory in its place: the system's answer is an error, whoever asks.
    path.rename(tmp_path / "put aside")
    path.mkdir()
    with pytest.raises(UnreadableFileError, match="cannot read"):
        _train(settings)
    path.rmdir()
    (tmp_path / "put aside").rename(path)
    assert not _said_of(_train(settings), path)
    assert _results(tmp_path / "run") == reference


def test_a_damaged_adapter_is_found_before_it_makes_the_next_inputs(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=1, step=0)
    flip_a_byte(_adapter_of(tmp_path / "run", 0))
    for shard in (tmp_path / "run" / "cache" / "block-01").iterdir():
        shard.unlink()
    assert _said_of(_train(settings), _adapter_of(tmp_path / "run", 0))
    assert _results(tmp_path / "run") == reference


@pytest.mark.parametrize("block", range(_BLOCKS))
def test_a_block_that_was_damaged_after_all_were_trained_is_trained_again(
    inputs, tmp_path, monkeypatch, reference, block
):
    _check_after_all_were_trained(_settings(inputs, tmp_path / "run"), block, monkeypatch)
    assert _results(tmp_path / "run") == reference


@pytest.mark.parametrize(("block", "changes"), [
    (0, {"schedule": "joint"}),
    (0, {"tune": "full"}),
    (1, {"tune": "full", "schedule": "joint"}),
    (1, {"retain": 1.0, "retain_tokens": 4}),
    (0, {"retain": 1.0, "retain_tokens": 4, "retain_answers": 4}),
    (1, {"retain": 1.0, "retain_tokens": 4, "retain_answers": 4}),
    (1, {"cache": "int8"}),
    (0, {"objective": "match"}),
])  # fmt: skip
def test_so_it_is_with_all_kinds_of_training(inputs, tmp_path, monkeypatch, changes, block):
    _train(_settings(inputs, tmp_path / "whole", blocks=2, **changes))
    _check_after_all_were_trained(_settings(inputs, tmp_path / "run", blocks=2, **changes), block, monkeypatch)
    assert _results(tmp_path / "run") == _results(tmp_path / "whole")


def _check_after_all_were_trained(settings: TrainSettings, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a block's file is found damaged when the result is to be written, and train again."""
    run, damaged = Path(str(settings.output)), []
    real = training_run.check_block

    def damage_first(bench: Any, of_block: Any) -> None:
        if not damaged:
            damaged.append(next(p for p in sorted((run / "blocks" / f"block-{block:02d}").iterdir()) if p.is_file()))
            flip_a_byte(damaged[0])
        real(bench, of_block)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "check_block", damage_first)
        with pytest.raises(DamagedFileError) as caught:
            _train(settings)
    assert damaged[0].name in caught.value.found
    assert "run the training again" in caught.value.fix
    assert not _results(run)
    assert "trained again" in "".join(_train(settings))


def test_a_damaged_shard_of_the_anchor_is_computed_again(inputs, tmp_path):
    def settings(name: str) -> TrainSettings:
        return _settings(inputs, tmp_path / name, blocks=2, retain=1.0, retain_tokens=4)

    _train(settings("whole"))
    _train_until(settings("run"), block=1, step=2)
    path = sorted((tmp_path / "run" / "cache" / "anchors").iterdir())[0]
    flip_a_byte(path)
    (text,) = _said_of(_train(settings("run")), path)
    assert "what the untouched model says is computed again" in text
    assert _results(tmp_path / "run") == _results(tmp_path / "whole")


@pytest.mark.parametrize("at", ["in the middle", "at the end"])
def test_after_a_damaged_last_line_of_the_journal_the_run_goes_on(inputs, tmp_path, reference, at):
    settings = _settings(inputs, tmp_path / "run")
    if at == "at the end":
        _train(settings)
    else:
        _train_until(settings, block=1, step=2)
    journal = tmp_path / "run" / "journal.jsonl"
    content = bytearray(journal.read_bytes())
    content[-4] ^= 1  # in its checksum
    journal.write_bytes(content)
    assert "what it spoke of is done again" in _said_of(_train(settings), journal)[0]
    assert _results(tmp_path / "run") == reference


def test_a_finished_run_without_its_adapter_and_its_blocks_is_trained_again(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    _train(settings)
    for part in ("adapter", "blocks"):
        shutil.rmtree(tmp_path / "run" / part)
    texts = _train(settings)
    assert [sum(f"block {block} is trained again" in text for text in texts) for block in (1, 2, 3)] == [1, 1, 1]
    assert _results(tmp_path / "run") == reference


def test_a_directory_that_is_not_ours_is_left_as_it_was(inputs, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for changes in ({}, {"fresh": True}):
        with pytest.raises(RunDirectoryError, match="is no run directory"):
            _train(_settings(inputs, tmp_path, **changes))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_without_its_journal_a_run_begins_anew_and_says_so(inputs, tmp_path, reference, damage):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=1, step=2)
    damage(tmp_path / "run" / "journal.jsonl")
    assert "trained anew" in _said_of(_train(settings), tmp_path / "run" / "journal.jsonl")[0]
    assert _results(tmp_path / "run") == reference


# -- the result, and the cost -----------------------------------------------------------------------------------------


def test_a_damaged_result_is_not_evaluated_or_exported(inputs, tmp_path):
    _train(_settings(inputs, tmp_path / "lora"))
    flip_a_byte(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    _train(_settings(inputs, tmp_path / "full", tune="full"))
    flip_a_byte(tmp_path / "full" / "model" / layer_shard(1))
    for name, damaged in (("lora", "adapter_model.safetensors"), ("full", layer_shard(1))):
        run = str(tmp_path / name)
        with pytest.raises(DamagedFileError, match=damaged):
            lopt_lite.evaluate(EvaluateSettings(run=run, data=str(inputs[1]), device="cpu"))
        kind = "merged" if name == "full" else "adapter"
        with pytest.raises(DamagedFileError, match=damaged):
            lopt_lite.export(ExportSettings(run=run, out=str(tmp_path / f"{name}-out"), format=kind, device="cpu"))


def test_a_run_of_an_earlier_release_goes_on_without_being_checked(inputs, tmp_path, reference):
    settings = _settings(inputs, tmp_path / "run")
    _train_until(settings, block=1, step=3)
    journal = tmp_path / "run" / "journal.jsonl"
    facts, _ = read_facts(journal)
    with open(journal, "w", encoding="utf-8") as file:
        for fact in facts:
            if fact["fact"] in ("cache-shard", "checkpoint"):
                del fact["sha256"]
            file.write(json.dumps(fact) + "\n")
    assert not [text for text in _train(settings) if "again" in text]
    assert _results(tmp_path / "run") == reference


def test_every_file_is_hashed_once_in_a_run(inputs, tmp_path, monkeypatch):
    reads: Counter[Path] = Counter()

    class CountedFile:
        def __init__(self, path: Path, *args: Any, **kwargs: Any) -> None:
            self._file, self._path, self._read = open(path, *args, **kwargs), Path(path), False

        def __enter__(self) -> CountedFile:
            return self

        def __exit__(self, *exc: object) -> None:
            self._file.close()

        def readinto(self, buffer: Any) -> int | None:
            if not self._read:
                self._read = True
                reads[self._path] += 1
            return self._file.readinto(buffer)

        def fileno(self) -> int:
            return self._file.fileno()

    monkeypatch.setattr(integrity, "open", CountedFile, raising=False)
    run = tmp_path / "run"
    _train(_settings(inputs, run))
    kinds = {str(path.relative_to(run)).split("/")[0] for path in reads}
    assert kinds == {"store", "cache", "blocks"}
    assert {path.name for path in reads if "store" in path.parts} == {p.name for p in run.glob("store/*.safetensors")}
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("how", ["weights", "config", "cut config", "no config", "gone"])
def test_an_adapter_that_is_not_what_the_run_wrote_is_written_again(inputs, tmp_path, one_thread, how):
    settings = _settings(inputs, tmp_path / "run")
    lopt_lite.train(settings)
    adapter = tmp_path / "run" / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    if how == "weights":
        flip_a_byte(adapter / "adapter_model.safetensors")
    elif how == "config":
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 32.0', '"lora_alpha": 72.0'))
    elif how == "cut config":
        os.truncate(adapter / "adapter_config.json", 100)
    elif how == "no config":
        (adapter / "adapter_config.json").unlink()
    else:
        shutil.rmtree(adapter)
    events: list[Event] = []
    outcome = lopt_lite.train(settings, on_event=events.append)
    assert not outcome.already_done
    assert any("written again" in event.text for event in events if isinstance(event, Notice))
    assert not any(isinstance(event, Step) for event in events), "no step is done twice"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert lopt_lite.train(settings).already_done


def test_where_the_base_model_is_may_be_put_right_by_hand(inputs, tmp_path, one_thread):
    settings = _settings(inputs, tmp_path / "run")
    lopt_lite.train(settings)
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": "someone/elsewhere"}))
    assert lopt_lite.train(settings).already_done
    assert json.loads(config.read_text())["base_model_name_or_path"] == "someone/elsewhere"


@pytest.mark.parametrize("how", ["cut", "zeroed", "no index"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_index_of_the_store_is_made_again(inputs, tmp_path, one_thread, how, finished):
    settings = _settings(inputs, tmp_path / "run")
    if finished:
        lopt_lite.train(settings)
    else:
        _train_until(settings, block=1, step=2)
    index = tmp_path / "run" / "store" / "model.safetensors.index.json"
    before = index.read_bytes()
    if how == "cut":
        os.truncate(index, 100)
    elif how == "zeroed":
        index.write_bytes(bytes(len(before)))
    else:
        index.write_text('{"metadata": {"lopt_lite": {"version": 1}}, "weight_map": {}}')
    lopt_lite.train(settings)
    assert index.read_bytes() == before
