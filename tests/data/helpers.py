"""Writes small data files and shows what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.load import LoadReport, load_dataset
from lopt_lite.events import Event, Notice


def write_lines(directory: Path, *records: Any, name: str = "data.jsonl") -> Path:
    """One line per record; strings and bytes are written as they are."""
    path = directory / name
    with open(path, "wb") as file:
        for record in records:
            if isinstance(record, str):
                record = record.encode()
            file.write((record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n")
    return path


def load(
    path: Path, tokenizer: Any, *, max_length: int = 4096, skip_bad_lines: bool = False
) -> tuple[TokenizedDataset, LoadReport, list[str]]:
    """The data set, the report, and the notices."""
    events: list[Event] = []
    dataset, report = load_dataset(
        path, tokenizer, max_length=max_length, skip_bad_lines=skip_bad_lines, on_event=events.append
    )
    return dataset, report, [event.text for event in events if isinstance(event, Notice)]


def trained_runs(dataset: TokenizedDataset, tokenizer: Any, index: int = 0) -> list[str]:
    """The text of each unbroken run of trained tokens of one example."""
    tokens, is_target = dataset.example(index)
    runs: list[list[int]] = []
    previous = False
    for token, target in zip(tokens.tolist(), is_target.tolist(), strict=True):
        if target and not previous:
            runs.append([])
        if target:
            runs[-1].append(token)
        previous = target
    return [tokenizer.decode(run) for run in runs]


def whole_text(dataset: TokenizedDataset, tokenizer: Any, index: int = 0) -> str:
    """The text of one example."""
    return tokenizer.decode(dataset.example(index)[0])
