"""Commands on runs that cannot be read, or with nowhere to write."""

from __future__ import annotations

import json
from pathlib import Path

from lopt_lite_cli.main import main

from tests.bad_inputs.place import (
    INPUT,
    RUN_DIRECTORY,
    SETTINGS,
    Place,
    bad,
    change_json,
)


def reading(command: str, run: Path, place: Place) -> list[str]:
    more = {
        "evaluate": [str(place.stock.data)],
        "generate": ["--prompt", "Hi"],
        "export": [str(place.root / "out")],
        "status": [],
        "report": [],
    }
    return [command, str(run), *more[command]]


for _command in ("evaluate", "generate", "export", "status", "report"):

    def _on_a_stray(place, command=_command):
        return reading(command, place.stray_directory("mine"), place)

    _on_a_stray.__name__ = f"{_command}_of_no_run"
    bad(RUN_DIRECTORY, "mine is not a run directory", "lopt-lite train")(_on_a_stray)

for _command in ("evaluate", "generate", "export"):

    def _on_an_unfinished(place, command=_command):
        journal = place.finished_run() / "journal.jsonl"
        facts = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(line for line in facts if json.loads(line)["fact"] != "adapter"))
        return reading(command, place.run, place)

    _on_an_unfinished.__name__ = f"{_command}_of_an_unfinished_run"
    bad(RUN_DIRECTORY, "is not finished", "lopt-lite status", "continue it with lopt-lite train")(_on_an_unfinished)


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 1")
def status_of_a_run_with_a_damaged_journal(place):
    (place.finished_run() / "journal.jsonl").write_text("garbage\n")
    return ["status", str(place.run)]


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 1")
def report_of_a_run_with_a_damaged_journal(place):
    (place.finished_run() / "journal.jsonl").write_text("garbage\n")
    return ["report", str(place.run)]


@bad(RUN_DIRECTORY, "mine", "not an empty directory", "new directory")
def export_to_a_directory_that_is_not_empty(place):
    return ["export", str(place.stock.run), str(place.stray_directory("mine"))]


@bad(RUN_DIRECTORY, "mine", "thesis.txt", "new or empty directory")
def merged_export_to_a_directory_that_is_not_empty(place):
    return ["export", str(place.stock.run), str(place.stray_directory("mine")), "--format", "merged"]


@bad(RUN_DIRECTORY, "run is not empty and is no store", "new or empty directory")
def merged_export_into_the_run_itself(place):
    place.finished_run()
    return ["export", str(place.run), str(place.run), "--format", "merged"]


@bad(RUN_DIRECTORY, "out holds a finished checkpoint already", "new or empty directory")
def merged_export_over_an_earlier_one(place):
    arguments = ["export", str(place.stock.run), str(place.root / "out"), "--format", "merged"]
    assert main(arguments) == 0
    return arguments


@bad(RUN_DIRECTORY, "notes.txt", "new")
def merged_export_to_a_file(place):
    (place.root / "notes.txt").write_text("remember the milk")
    return ["export", str(place.stock.run), str(place.root / "notes.txt"), "--format", "merged"]


@bad(INPUT, "is not the one this run was trained from", "--model", "--onto quantized")
def merged_export_onto_another_model(place):
    place.change_weights(lambda tensors: tensors["model.norm.weight"].add_(1))
    options = ["--format", "merged", "--model", str(place.model)]
    return ["export", str(place.stock.run), str(place.root / "out"), *options]


@bad(INPUT, "'gone'", "--model", "--onto quantized")
def merged_export_after_the_model_was_deleted(place):
    gone = {"given": "gone", "origin": "gone", "fingerprint": "0"}
    change_json(place.finished_run() / "settings.json", model=gone, crc32=None)
    return ["export", str(place.run), str(place.root / "out"), "--format", "merged"]


@bad(INPUT, "own.jsonl, line 1", "--skip-bad-lines")
def evaluate_on_bad_data(place):
    return ["evaluate", str(place.stock.run), str(place.own_data(["{"]))]


@bad(SETTINGS, "--prompt is not text", "UTF-8")
def generate_with_a_prompt_that_is_no_text(place):
    return ["generate", str(place.stock.run), "--prompt", "a\udcff"]


@bad(SETTINGS, "--prompt is empty", "the text to answer")
def generate_without_a_prompt(place):
    return ["generate", str(place.stock.run)]
