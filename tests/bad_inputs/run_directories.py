"""Directories that cannot be written or continued, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

from tests.bad_inputs.place import (
    DOES_NOT_FIT,
    GOOD_LINE,
    INPUT,
    RUN_DIRECTORY,
    SETTINGS,
    bad,
)
from tests.damage import flip_a_byte

# -- the run directory -------------------------------------------------------------------------------------------------


@bad(RUN_DIRECTORY, "thesis.txt", "no run directory", "--output")
def output_that_holds_something_else(place):
    place.run = place.stray_directory("mine")
    return place.train()


@bad(RUN_DIRECTORY, "thesis.txt", "no run directory", "--output")
def fresh_output_that_holds_something_else(place):
    place.run = place.stray_directory("mine")
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "no run directory", "adapter", "--output")
def fresh_output_whose_parts_are_called_like_a_run_s(place):
    place.run = place.root / "mine"
    place.run.mkdir()
    for name in ("adapter", "cache", "store"):
        shutil.copytree(place.stray_directory(name), place.run / name)
    (place.run / "settings.json").write_text('{"editor": "vi"}')
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "no run directory", "--output")
def fresh_output_that_is_a_store(place):
    shutil.copytree(place.stock.run / "store", place.run)
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "--fresh would delete", "store", "--output")
def fresh_output_whose_store_is_the_model(place):
    place.model = place.finished_run() / "store"
    return place.train("--fresh")


@bad(SETTINGS, "--store", "is the run directory", "leave --store out")
def store_that_is_the_run_directory(place):
    return place.train("--store", str(place.run))


@bad(RUN_DIRECTORY, "is no store", "new or empty directory")
def store_that_is_the_model_itself(place):
    return place.train("--store", str(place.own_model()))


@bad(RUN_DIRECTORY, "is no store", "new or empty directory")
def store_that_is_another_run(place):
    other = shutil.copytree(place.stock.run, place.root / "other")
    return place.train("--store", str(other))


@bad(RUN_DIRECTORY, "made with quantize none", "expected: quantize nf4", "another --store")
def store_of_other_settings(place):
    store = shutil.copytree(place.stock.run / "store", place.root / "store")
    return place.train("--store", str(store), "--quantize", "nf4")


@bad(RUN_DIRECTORY, "thesis.txt", "new or empty directory")
def store_that_holds_something_else(place):
    return place.train("--store", str(place.stray_directory("mine")))


@bad(RUN_DIRECTORY, "notes.txt", "--output")
def output_that_is_a_file(place):
    place.run = place.root / "notes.txt"
    place.run.write_text("remember the milk")
    return place.train()


@bad(RUN_DIRECTORY, "cannot create the directory", "Not a directory", "--output")
def output_below_a_file(place):
    (place.root / "notes.txt").write_text("remember the milk")
    place.run = place.root / "notes.txt" / "run"
    return place.train()


@bad(RUN_DIRECTORY, "run is not writable", "change its rights")
def output_that_is_not_writable(place):
    place.run.mkdir()
    allowed = os.access
    place.patch.setattr(os, "access", lambda path, mode: Path(path) != place.run and allowed(path, mode))
    return place.train()


@bad(RUN_DIRECTORY, "in use by another process", "wait for it to end")
def run_directory_in_use(place):
    hold = (
        "import sys, pathlib; from lopt_lite.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), what=''): input(print('held'))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(place.finished_run())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    place.cleanup.callback(holder.communicate, "\n", timeout=30)
    assert holder.stdout.readline() == "held\n"
    return place.train()


@bad(RUN_DIRECTORY, "no --lr, not 0.001", "go back to the old value", "--fresh", "another --output")
def another_learning_rate_for_a_finished_run(place):
    place.finished_run()
    return place.train("--lr", "1e-3")


@bad(RUN_DIRECTORY, "DATA ", "own.jsonl (the contents differ)", "go back to the old value", "--fresh")
def changed_data_for_a_finished_run(place):
    place.finished_run()
    place.own_data([GOOD_LINE] * 4)
    return place.train()


@bad(RUN_DIRECTORY, "MODEL ", "the contents differ", "go back to the old value", "--fresh")
def changed_model_for_a_finished_run(place):
    place.finished_run()
    place.change_weights(lambda tensors: tensors["model.norm.weight"].add_(1))
    return place.train()


@bad(INPUT, "own.jsonl is empty")
def fresh_with_bad_data_on_a_finished_run(place):
    place.finished_run()
    place.own_data(b"")
    return place.train("--fresh")


@bad(INPUT, "lacks lm_head.weight")
def fresh_with_an_incomplete_model_on_a_finished_run(place):
    place.finished_run()
    place.change_weights(lambda tensors: tensors.pop("lm_head.weight"))
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 2", "--fresh", "backup")
def damaged_journal(place):
    journal = place.finished_run() / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1][5:], *lines[2:]]))
    return place.train()


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 1", "checksum", "--fresh", "backup")
def altered_journal(place):
    journal = place.finished_run() / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([json.dumps({**json.loads(lines[0]), "micro_batch_tokens": 64}) + "\n", *lines[1:]]))
    return place.train()


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 1", "micro_batch_tokens", "--fresh", "backup")
def altered_journal_without_checksums(place):
    journal = place.finished_run() / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    first = {**json.loads(lines[0]), "micro_batch_tokens": "many"}
    del first["crc32"]
    journal.write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
    return place.train()


@bad(RUN_DIRECTORY, "settings.json is not valid JSON", "--fresh")
def damaged_settings(place):
    os.truncate(place.finished_run() / "settings.json", 100)
    return place.train()


@bad(RUN_DIRECTORY, "settings.json was altered", "checksum", "--fresh", "backup")
def altered_settings_of_a_finished_run(place):
    path = place.finished_run() / "settings.json"
    content = json.loads(path.read_text())
    content["settings"]["lora_alpha"] = 3200.0
    path.write_text(json.dumps(content))
    return ["generate", str(place.run), "--prompt", "What?"]


@bad(INPUT, "adapter_model.safetensors is missing", "the training again", "writes the adapter anew")
def adapter_deleted_from_a_finished_run(place):
    (place.finished_run() / "adapter" / "adapter_model.safetensors").unlink()
    return ["evaluate", str(place.run), str(place.data)]


@bad(INPUT, "adapter_config.json is not as it was written", "the training again", "writes the adapter anew")
def adapter_of_another_scale(place):
    config = place.finished_run() / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 72'))
    return ["export", str(place.run), str(place.run.parent / "out")]


@bad(INPUT, "layer-00001.safetensors is missing", "lopt-lite quantize", "rebuilds it from the model")
def store_shard_deleted_from_a_finished_run(place):
    (place.finished_run() / "store" / "layer-00001.safetensors").unlink()
    return ["evaluate", str(place.run), str(place.data)]


@bad(INPUT, "layer-00001.safetensors is damaged", "as when it was written", "rebuilds it from the model")
def store_shard_with_another_byte(place):
    flip_a_byte(place.finished_run() / "store" / "layer-00001.safetensors")
    return ["evaluate", str(place.run), str(place.data)]


@bad(
    INPUT,
    "adapter_model.safetensors is damaged",
    "as when it was written",
    "the training again",
    "writes the adapter anew",
)
def adapter_with_another_byte(place):
    flip_a_byte(place.finished_run() / "adapter" / "adapter_model.safetensors")
    return ["evaluate", str(place.run), str(place.data)]


# -- memory and disk ---------------------------------------------------------------------------------------------------


@bad(DOES_NOT_FIT, "the run needs", "1,000 are free", "free some space")
def nearly_full_disk(place):
    usage = namedtuple("usage", "total used free")
    place.patch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    return place.train()


@bad(DOES_NOT_FIT, "the disk is full", "layer-00000.safetensors", "give the same command again")
def disk_that_fills_up_while_the_store_is_written(place):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name.startswith("layer-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    place.patch.setattr(os, "replace", full)
    return place.train()


@bad(RUN_DIRECTORY, "Read-only file system", "--output")
def read_only_disk(place):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    place.patch.setattr(Path, "mkdir", refuse)
    return place.train()
