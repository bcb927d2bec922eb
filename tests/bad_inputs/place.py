"""Where a bad input is prepared, and the table that the cases register in."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

SETTINGS, INPUT, DOES_NOT_FIT, RUN_DIRECTORY = 2, 3, 4, 5

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GOOD_LINE = {"question": "What is 1 + 1?", "answer": "2"}
OPTIONS = ("--quantize", "none", "--dtype", "float32", "--device", "cpu", "--head-fit-epochs", "0")


class Stock(NamedTuple):
    """Sound things made once; a case copies what it damages."""

    model: Path
    sharded: Path
    data: Path
    run: Path


@dataclass
class Place:
    """Where one case plays: its directory, and what its command line will name."""

    root: Path
    stock: Stock
    patch: pytest.MonkeyPatch
    cleanup: contextlib.ExitStack
    model: Path = field(init=False)
    data: Path = field(init=False)
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.data, self.run = self.stock.model, self.stock.data, self.root / "run"

    def own_model(self, *, sharded: bool = False) -> Path:
        """A copy of the tiny model, to damage."""
        source = self.stock.sharded if sharded else self.stock.model
        self.model = shutil.copytree(source, self.root / "model")
        return self.model

    def change_config(self, **values: Any) -> None:
        change_json(self.own_model() / "config.json", **values)

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.own_model() / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def change_index(self, change: Callable[[dict[str, str]], object]) -> None:
        path = self.own_model(sharded=True) / INDEX
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    def own_data(self, content: bytes | list[Any]) -> Path:
        """A data file of these bytes, or of these objects and ready-made lines."""
        self.data = self.root / "own.jsonl"
        if isinstance(content, list):
            lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
            content = "".join(line + "\n" for line in lines).encode()
        self.data.write_bytes(content)
        return self.data

    def finished_run(self) -> Path:
        """A copy of a finished run."""
        return shutil.copytree(self.stock.run, self.run)

    def stray_directory(self, name: str) -> Path:
        """A directory that holds something of the user's."""
        directory = self.root / name
        directory.mkdir()
        (directory / "thesis.txt").write_text("three years of work")
        (directory / ".thesis.txt.tmp").write_text("and the newest page")
        return directory

    def train(self, *options: str) -> list[str]:
        return ["train", str(self.model), str(self.data), "--output", str(self.run), *OPTIONS, *options]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Case(NamedTuple):
    code: int
    words: tuple[str, ...]
    prepare: Callable[[Place], list[str]]
    found_at_work: bool


CASES: dict[str, Case] = {}


def bad(code: int, *words: str, found_at_work: bool = False) -> Callable[[Callable[[Place], list[str]]], None]:
    """Register a case: its exit code and words of its message.

    ``found_at_work``: it can only be found while the weights are prepared, so the run directory may have been begun.
    """

    def register(prepare: Callable[[Place], list[str]]) -> None:
        assert prepare.__name__ not in CASES
        CASES[prepare.__name__] = Case(code, words, prepare, found_at_work)

    return register
