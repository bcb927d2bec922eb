"""metrics.jsonl: one line per optimiser step.

A record for people and plots, not a source of truth: lines are not fsynced. Steps that a crash made undone are cut off
when the run goes on, so that the lines of an interrupted run, put together, are those of a whole one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lopt_lite import files
from lopt_lite.events import Step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that are steps; a torn or damaged line is left out.

    Each has an int ``block`` and ``step``, a str ``phase``, and ``loss``. A value that was not finite is None.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_step(record):
            records.append(record)
    return records


def _is_step(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
        return False
    numbered = all(type(record.get(name)) is int for name in ("block", "step"))
    measured = [record.get(name) for name in ("loss", "tokens", "tokens_per_s")]
    return numbered and "loss" in record and all(v is None or type(v) in (int, float) for v in measured)


class Metrics:
    """The open metrics file of a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = files.open_lines(path)

    def add(self, step: Step) -> None:
        """Append one step."""
        record = {name: value for name, value in step.to_json().items() if name != "event"}
        files.append_line(self._file, record, durable=False)

    def forget_undone(self, block: int, phase_order: tuple[str, ...], phase: str, step: int) -> None:
        """Drop the lines of ``block`` that lie after ``step`` steps of ``phase``, and of any later block."""
        done = (block, phase_order.index(phase), step)

        def place(record: dict[str, Any]) -> tuple[int, int, int]:
            return record["block"], phase_order.index(record["phase"]), record["step"]

        kept = [r for r in read_metrics(self._path) if r["phase"] in phase_order and place(r) <= done]
        self._file.close()
        files.write_bytes(self._path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = files.open_lines(self._path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
