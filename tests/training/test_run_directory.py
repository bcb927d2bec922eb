"""A run directory belongs to one run: the same settings continue it, others are told what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lopt_lite import TrainSettings, files
from lopt_lite.errors import RunDirectoryError
from lopt_lite.recipe import ModelKind
from lopt_lite.training import run_directory
from lopt_lite.training.run_directory import RunIdentity, RunPaths, claim, note_store, read_settings, start_fresh

_KIND = ModelKind("LlamaForCausalLM", 2048, 4)


def _identity(**changes: object) -> RunIdentity:
    names = ("model_fingerprint", "data_fingerprint", "validation_fingerprint", "device")
    own = {name: changes.pop(name) for name in names if name in changes}
    values = {"model": "model.safetensors", "data": "data.jsonl", **changes}
    identity = RunIdentity(
        settings=TrainSettings(**values).settle(has_prompts=True, model=_KIND),
        model_origin="models/tiny",
        model_fingerprint="m1",
        model_kind=_KIND,
        data_fingerprint="d1",
        validation_fingerprint=None,
        store="store",
        device="cpu",
    )
    return dataclasses.replace(identity, **own)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


@pytest.fixture
def claimed(paths: RunPaths) -> RunPaths:
    assert claim(paths, _identity()) == []
    return paths


def test_the_same_run_again_is_welcome_and_the_file_is_not_rewritten(claimed):
    before = claimed.settings.read_bytes()
    assert claim(claimed, _identity()) == []
    assert claimed.settings.read_bytes() == before


def test_settings_say_what_was_given_and_with_which_versions(claimed):
    content = read_settings(claimed)
    assert content["model"] == {
        "given": "model.safetensors",
        "origin": "models/tiny",
        "fingerprint": "m1",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 2048,
        "layers": 4,
    }
    assert content["data"] == {"given": "data.jsonl", "fingerprint": "d1"}
    assert content["settings"]["blocks"] == 2
    assert content["versions"]["torch"][0].isdigit()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": 3}, "--blocks 2, not 3"),
        ({"lora_r": 8}, "--lora-r 16, not 8"),
        ({"lr": 1e-3}, "no --lr, not 0.001"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"objective": "reconstruct"}, "--objective none, not reconstruct"),
        ({"quantize": "none"}, "--quantize nf4, not none"),
        ({"model_fingerprint": "m2"}, "MODEL model.safetensors, with other content"),
        ({"model_fingerprint": "m2", "model": "other"}, "MODEL model.safetensors, not other"),
        ({"data_fingerprint": "d2"}, "DATA data.jsonl, with other content"),
        ({"validation_fingerprint": "v2", "validation": "held_out.jsonl"}, "no --validation, not held_out.jsonl"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name_with_the_ways_on(claimed, changes, said):
    before = claimed.settings.read_bytes()
    with pytest.raises(RunDirectoryError) as caught:
        claim(claimed, _identity(**changes))
    assert said in caught.value.found
    assert "--fresh" in caught.value.fix
    assert "old value" in caught.value.fix
    assert claimed.settings.read_bytes() == before


def test_a_run_whose_blocks_are_all_alike_goes_on_with_blocks_of_that_size(paths):
    """As runs of earlier versions are, which said nothing of the last one."""
    assert claim(paths, _identity()) == []
    content = read_settings(paths)
    del content["settings"]["last_layers"]
    files.write_json(paths.settings, content)
    with pytest.raises(RunDirectoryError, match="was started with --last-layers 2, not 3"):
        claim(paths, _identity())
    assert claim(paths, _identity(last_layers=2)) == []


@pytest.mark.parametrize(
    ("began", "now", "said"),
    [
        ({}, {"lr": 1e-3}, ["no --lr, not 0.001"]),
        ({"lr": 1e-3}, {}, ["--lr 0.001, which is not given"]),
        ({}, {"blocks": 1}, ["--blocks 2, not 1"]),
        ({}, {"skip_bad_lines": True}, ["no --skip-bad-lines, which is given now"]),
        ({"skip_bad_lines": True}, {}, ["--skip-bad-lines, which is not given"]),
        ({"lr": 1e-3}, {"lr": 1e-3, "lr_early": 1e-3}, ["--lr-early 0.0001, not 0.001"]),
    ],
    ids=str,
)
def test_only_what_was_asked_for_is_told(paths, began, now, said):
    """And not the defaults that follow from it."""
    assert claim(paths, _identity(**began)) == []
    with pytest.raises(RunDirectoryError) as caught:
        claim(paths, _identity(**now))
    assert caught.value.found.partition("was started with ")[2].split("; ") == said


def test_a_run_of_some_weight_goes_on_with_that_weight(paths):
    """As runs of earlier versions are, whose default was a number."""
    assert claim(paths, _identity(retain=3.0)) == []
    with pytest.raises(RunDirectoryError, match=r"was started with --retain 3\.0, which is not given"):
        claim(paths, _identity())
    assert claim(paths, _identity(retain=3.0)) == []


def test_all_differences_are_named(claimed):
    with pytest.raises(RunDirectoryError, match=r"--blocks 2, not 4; --seed 0, not 3"):
        claim(claimed, _identity(blocks=4, seed=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_hours": 1.0},
        {"deadline": "07:00"},
        {"checkpoint_every": "1s"},
        {"quiet": True},
        {"model": "moved/model.safetensors"},
        {"data": "moved/data.jsonl"},
        {"output": "elsewhere"},
    ],
)
def test_what_does_not_change_the_result_may_differ(claimed, changes):
    assert claim(claimed, _identity(**changes)) == []


def test_moved_validation_data_may_differ(paths):
    claim(paths, _identity(validation="a.jsonl", validation_fingerprint="v"))
    assert claim(paths, _identity(validation="moved/a.jsonl", validation_fingerprint="v")) == []


def test_another_device_or_version_goes_on_with_a_remark(claimed, monkeypatch):
    (remark,) = claim(claimed, _identity(device="cuda"))
    assert "cpu" in remark
    assert "cuda" in remark
    monkeypatch.setattr(run_directory, "versions", lambda: {"torch": "99.0"})
    (remark,) = claim(claimed, _identity())
    assert "-> 99.0" in remark


def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(paths):
    (paths.root / "thesis.tex").write_text("precious")
    for act in (lambda: claim(paths, _identity()), lambda: start_fresh(paths)):
        with pytest.raises(RunDirectoryError, match=r"is no run directory \(it holds thesis\.tex\)"):
            act()
    assert [p.name for p in paths.root.iterdir()] == ["thesis.tex"]


def test_a_lock_file_and_hidden_files_do_not_make_it_something_else(paths):
    for name in ("lock", "lock.pid", ".DS_Store"):
        (paths.root / name).write_text("")
    assert claim(paths, _identity()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', ""])
def test_damaged_settings_are_refused(claimed, content):
    claimed.settings.write_text(content)
    with pytest.raises(RunDirectoryError, match=r"settings\.json") as caught:
        claim(claimed, _identity())
    assert "--fresh" in caught.value.fix


def _alter(path: Path, *keys: str, value: Any, forget_sum: bool) -> None:
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    if forget_sum:
        del content["crc32"]
    path.write_text(json.dumps(content))


def test_a_setting_that_was_altered_is_damage_and_not_another_result(claimed):
    """As one flipped bit of a number makes another number."""
    assert read_settings(claimed) == _identity().to_json()
    _alter(claimed.settings, "settings", "lora_alpha", value=3200.0, forget_sum=False)
    with pytest.raises(RunDirectoryError, match=r"settings\.json was altered") as caught:
        read_settings(claimed)
    assert "--fresh" in caught.value.fix


def test_where_the_store_is_now_is_written_down_with_a_checksum(claimed, tmp_path):
    note_store(claimed, tmp_path / "elsewhere")
    assert read_settings(claimed)["store"] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["settings"], []),
        (["settings", "blocks"], "two"),
        (["settings", "lr"], [1e-3]),
        (["model"], "x"),
        (["data", "given"], 5),
        (["validation"], "x"),
        (["versions"], [1]),
        (["config"], [5]),
        (["store"], 5),
    ],
)
def test_settings_of_another_form_are_damage_in_runs_without_a_checksum(claimed, keys, value):
    """As those of earlier versions."""
    _alter(claimed.settings, *keys, value=value, forget_sum=True)
    with pytest.raises(RunDirectoryError, match=r"settings\.json is damaged"):
        read_settings(claimed)


def test_a_directory_without_settings_is_no_run(paths):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        read_settings(paths)


def _fill(paths: RunPaths) -> None:
    for path in (paths.store, paths.adapter, paths.cache(1), paths.checkpoint(0)):
        path.mkdir(parents=True)
        (path / "x.safetensors").write_bytes(b"x")
    for path in (paths.journal, paths.metrics, paths.root / "report.html", paths.root / "loss.png"):
        path.write_text(json.dumps({"fact": "block", "block": 0}) + "\n")


def test_starting_fresh_deletes_what_the_run_made_and_keeps_the_rest(claimed):
    _fill(claimed)
    (claimed.root / "notes.txt").write_text("mine")
    (claimed.root / "lock").write_text("")
    start_fresh(claimed)
    assert sorted(p.name for p in claimed.root.iterdir()) == ["lock", "notes.txt"]


@pytest.mark.parametrize("cut", range(9))
def test_a_crash_while_starting_fresh_leaves_a_run_with_nothing_done(claimed, monkeypatch, cut):
    class Crash(BaseException):
        pass

    _fill(claimed)
    remove_tree, calls = files.remove_tree, []

    def cut_off(path: Path) -> None:
        if len(calls) == cut:
            raise Crash
        calls.append(path)
        remove_tree(path)

    monkeypatch.setattr(run_directory.files, "remove_tree", cut_off)
    with pytest.raises(Crash):
        start_fresh(claimed)
    assert not claimed.journal.exists(), "what was deleted must not count as done"
    assert claim(claimed, _identity()) == [], "what is left is still this run's"
    monkeypatch.setattr(run_directory.files, "remove_tree", remove_tree)
    start_fresh(claimed)
    assert list(claimed.root.iterdir()) == []


def test_a_run_of_a_release_that_lacked_an_option_is_one_with_its_default(claimed):
    content = read_settings(claimed)
    del content["settings"]["memory"]
    files.write_json(claimed.settings, content)
    assert claim(claimed, _identity()) == []
    with pytest.raises(RunDirectoryError, match=r"--memory auto, not 1GiB \(in which parts"):
        claim(claimed, _identity(memory="1GiB"))


def test_a_crash_while_a_tuned_model_is_deleted_leaves_no_complete_one(claimed, monkeypatch):
    """Its index says that it is complete: the next run would take what is left of it for its own result."""
    claimed.model.mkdir()
    for name in ("model.safetensors.index.json", "layer-00000.safetensors"):
        (claimed.model / name).write_text("{}")
    monkeypatch.setattr(run_directory.files, "remove_tree", lambda path: pytest.fail("as if the power failed here"))
    with pytest.raises(pytest.fail.Exception):
        start_fresh(claimed)
    assert [path.name for path in claimed.model.iterdir()] == ["layer-00000.safetensors"]
