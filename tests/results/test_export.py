"""Taking the result elsewhere: from any directory, whole or not at all, and again after it was cut off."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lopt_lite
from lopt_lite import EvaluateSettings, ExportSettings, QuantizeSettings, TrainSettings, files
from lopt_lite.checkpoints import build_store
from lopt_lite.errors import DoesNotFitError, ModelError, RunDirectoryError
from tests.data.tiny_tokenizers import CHATML, make_tokenizer
from tests.tiny_models import make_data, make_model

TEMPLATES = {"default": CHATML, "tool_use": CHATML + "{# with tools #}"}


def _train(home: Path, name: str, **changes: Any) -> Path:
    """A run that was started in ``home``, with paths from there."""
    values: dict[str, Any] = {"model": "multi", "dtype": "float32", "batch_size": 8, "blocks": 1, **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        lopt_lite.train(TrainSettings(data="data.jsonl", output=name, **values))
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs were started: beside a model whose tokenizer has several chat templates."""
    directory = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES
    make_model(directory / "multi", tokenizer=tokenizer)
    make_data(directory / "data.jsonl", 8)
    return directory


@pytest.fixture(scope="module")
def lora(home: Path) -> Path:
    return _train(home, "lora", quantize="none")


@pytest.fixture(scope="module")
def full(home: Path) -> Path:
    return _train(home, "full", tune="full")


def _export(run: Path, out: Path, **changes: Any) -> None:
    lopt_lite.export(ExportSettings(run=str(run), out=str(out), **changes))


def _content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def _interrupt_at(patch: pytest.MonkeyPatch, module: Any, call: str, number: int, error: BaseException) -> None:
    """Let the call of this ``number`` raise instead."""
    original, calls = getattr(module, call), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return original(*arguments, **named)

    patch.setattr(module, call, counted)


def test_an_adapter_with_several_chat_templates_is_exported_with_all_of_them(lora, tmp_path):
    assert (lora / "adapter" / "additional_chat_templates").is_dir()
    _export(lora, tmp_path / "out")
    assert _content(tmp_path / "out") == _content(lora / "adapter")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("is_there", [False, True])
def test_an_export_by_copying_that_was_cut_off_can_be_given_again(full, tmp_path, monkeypatch, error, is_there):
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    with monkeypatch.context() as patch:
        _interrupt_at(patch, files.shutil, "copyfileobj", 4, error)
        with pytest.raises((KeyboardInterrupt, DoesNotFitError)):
            _export(full, out, format="merged")
    assert out.exists() == is_there
    assert not _content(tmp_path)
    _export(full, out, format="merged")
    assert _content(out) == _content(full / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_a_merge_that_was_cut_off_goes_on_where_it_was(lora, home, tmp_path, monkeypatch, onto):
    monkeypatch.chdir(home)
    _export(lora, tmp_path / "whole", format="merged", onto=onto)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _interrupt_at(patch, build_store, "write_shard", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _export(lora, out, format="merged", onto=onto)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(done) == 3
    _export(lora, out, format="merged", onto=onto)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert _content(out) == _content(tmp_path / "whole")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_merge_that_was_cut_off_while_it_tidied_up_can_be_given_again(lora, home, tmp_path, monkeypatch, number):
    monkeypatch.chdir(home)
    _export(lora, tmp_path / "whole", format="merged")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _interrupt_at(patch, files, "remove_file", number, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            _export(lora, out, format="merged")
    assert (out / "journal.jsonl").exists()
    _export(lora, out, format="merged")
    assert _content(out) == _content(tmp_path / "whole")


@pytest.mark.parametrize("typed", ["multi", "multi/model.safetensors"])
def test_a_model_named_by_a_relative_path_is_merged_into_from_another_directory(
    lora, home, tmp_path, monkeypatch, typed
):
    monkeypatch.chdir(home)
    _export(lora, tmp_path / "whole", format="merged")
    run = shutil.copytree(lora, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["model"]["given"] == "multi"
    settings["model"]["given"] = typed
    del settings["crc32"]  # as in runs of earlier versions
    (run / "settings.json").write_text(json.dumps(settings))
    make_model(tmp_path / "multi", seed=5)  # of the same name, and not the one
    monkeypatch.chdir(tmp_path)
    _export(Path("run"), Path("out"), format="merged")
    assert _content(tmp_path / "out") == _content(tmp_path / "whole")


def test_the_store_of_another_model_is_not_taken_for_a_merge_that_was_cut_off(lora, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    store = shutil.copytree(lora / "store", tmp_path / "store")
    assert (store / "journal.jsonl").exists()
    before = _content(store)
    with pytest.raises(RunDirectoryError, match="holds a finished checkpoint already"):
        _export(lora, store, format="merged")
    assert _content(store) == before


def test_what_only_copies_needs_no_store(lora, full, tmp_path):
    for run, changes in ((lora, {"format": "adapter"}), (full, {"format": "merged"})):
        alone = tmp_path / run.name
        shutil.copytree(run, alone, ignore=shutil.ignore_patterns("store"))
        # Where the run says that its store is, there is none any more either.
        (run / "store").rename(tmp_path / "elsewhere")
        try:
            _export(alone, tmp_path / f"of-{run.name}", **changes)
        finally:
            (tmp_path / "elsewhere").rename(run / "store")
        part = "adapter" if run is lora else "model"
        assert _content(tmp_path / f"of-{run.name}") == _content(run / part)


def test_a_run_from_a_store_merges_onto_what_the_store_was_made_from(home, tmp_path):
    store = tmp_path / "store"
    lopt_lite.quantize(QuantizeSettings(model=str(home / "multi"), store=str(store)))
    run = _train(home, str(tmp_path / "run"), model=str(store))
    direct = _train(home, str(tmp_path / "direct"))
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        direct / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    _export(run, tmp_path / "of-run", format="merged", model=str(home / "multi"))
    _export(direct, tmp_path / "of-direct", format="merged")
    weights = [_content(tmp_path / name)["layer-00001.safetensors"] for name in ("of-run", "of-direct")]
    assert weights[0] == weights[1]
    # By itself it has the 4-bit weights alone, and says so.
    for out, onto in (("by-itself", "original"), ("quantized", "quantized")):
        settings = ExportSettings(run=str(run), out=str(tmp_path / out), format="merged", onto=onto)
        assert lopt_lite.export(settings).onto == "quantized"
    weights = [_content(tmp_path / name)["layer-00001.safetensors"] for name in ("by-itself", "quantized", "of-run")]
    assert weights[0] == weights[1] != weights[2]
    other = make_model(tmp_path / "other", seed=7)
    with pytest.raises(ModelError, match="is not the one this run was trained from"):
        _export(run, tmp_path / "of-other", format="merged", model=str(other))


def test_small_files_that_are_lost_or_broken_are_told_of_and_written_again_by_training(home, tmp_path):
    run = _train(home, str(tmp_path / "run"))
    for path, damage in (
        (run / "store" / "config.json", lambda path: path.write_text("")),
        (run / "store" / "config.json", Path.unlink),
        (run / "adapter" / "tokenizer.json", lambda path: path.write_text("x")),
        (run / "adapter" / "tokenizer.json", Path.unlink),
    ):
        sound = path.read_bytes()
        damage(path)
        # A tokenizer that is gone is found in the store.
        if path.parent.name == "store" or path.exists():
            with pytest.raises(ModelError) as caught:
                lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(home / "data.jsonl")))
            assert "the command of the training again" in caught.value.fix
            assert "--config" not in caught.value.fix
        _train(home, str(run))
        assert path.read_bytes() == sound
    lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(home / "data.jsonl")))
