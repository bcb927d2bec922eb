"""What every benchmark shares: its options, its measurements kept for the next start, its table in Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alone import Alone
from lopt_lite import files

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--directory", help=f"where models, runs and measurements go (runs/benchmark-{name})")
    made.add_argument("--quick", action="store_true", help="tiny shapes: shows that the script works, measures nothing")
    made.add_argument("--write", action="store_true", help=f"also write benchmarks/results/{name}.md")
    made.add_argument("--again", action="store_true", help="measure anew what an earlier start has measured")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads to compute with (all)")
    return made


@dataclass
class Bench:
    """One start of one benchmark.

    Attributes
    ----------
    name, doc:
        The script's name and docstring, which introduces the table.
    directory:
        Where everything temporary goes.
    """

    name: str
    doc: str
    directory: Path
    quick: bool
    write: bool
    again: bool
    threads: int
    command: str
    _lines: list[str] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, doc: str, options: argparse.Namespace, arguments: Sequence[str] | None) -> Bench:
        """From the options of :func:`parser` and the ``arguments`` they came from (None: the command line)."""
        if options.quick and options.write:
            raise SystemExit("--quick measures nothing that is worth writing down")
        default = f"runs/benchmark-{name}" + ("-quick" if options.quick else "")
        directory = Path(options.directory or default)
        directory.mkdir(parents=True, exist_ok=True)
        command = _command(name, sys.argv[1:] if arguments is None else arguments)
        return cls(name, doc, directory, options.quick, options.write, options.again, options.threads, command)

    @property
    def alone(self) -> Alone:
        """How to start processes."""
        return Alone(threads=1 if self.quick else self.threads, warm=self.quick)

    def measure(self, key: str, measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``measurement``, or what an earlier start found under the same key and with as many threads."""
        path = self.directory / "measured" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key)}-{self.threads}.json"
        if path.exists() and not self.again:
            self.say(f"{key}: kept from an earlier start")
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        self.say(f"{key} ...")
        result = measurement()
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, result)
        return result

    def say(self, text: str) -> None:
        """Tell what is being done."""
        print(f"[{self.name}] {text}", file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Add a paragraph to the report."""
        self._lines += ["", text]

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table to the report; numbers are aligned to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [max([len(name), 3, *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
        right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]

        def line(row: Sequence[str]) -> str:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            return "| " + " | ".join(padded) + " |"

        rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
        self._lines += ["", line(columns), line(rule), *map(line, cells)]

    def expect(self, holds: bool, text: str) -> None:
        """Note that something should have come out otherwise; a quick start judges nothing."""
        if not holds and not self.quick:
            self._failures.append(text)

    def finish(self) -> int:
        """Print the report (and write it, if asked to); returns the exit code."""
        if self._failures:
            self.text("Not as it should be: " + "; ".join(self._failures) + ".")
        else:
            self.text("Everything as it should be." if not self.quick else "Tiny shapes: these numbers mean nothing.")
        head = [f"# {self.name}", "", self.doc.strip(), "", f"    {self.command}", "", machine(self.threads)]
        content = "\n".join([*head, *self._lines]) + "\n"
        print(content, end="")
        if self.write:
            RESULTS.mkdir(exist_ok=True)
            files.write_bytes(RESULTS / f"{self.name}.md", content.encode())
        return 1 if self._failures else 0


def _command(name: str, arguments: Sequence[str]) -> str:
    """What was typed, without what the result does not depend on."""
    given = list(arguments)
    if "--directory" in given:
        at = given.index("--directory")
        del given[at : at + 2]
    kept = [a for a in given if a not in ("--write", "--again") and not a.startswith("--directory=")]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *kept])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine(threads: int) -> str:
    """One line that names the machine and the versions."""
    import psutil
    import torch

    import lopt_lite

    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"Machine: {model}, {os.cpu_count()} cores ({threads} threads used), {memory:.1f} GiB of memory; "
        f"torch {torch.__version__}, lopt-lite {lopt_lite.__version__}."
    )


def describe(residence: dict[str, Any]) -> str:
    """A run's way of working in a few words, from the journal's fact ``residence``."""
    words = [str(residence["mode"])]
    if residence["mode"] == "partly streamed":
        words[0] = f"{residence['resident_layers']} of {residence['layers']} resident"
    if residence["offload_state"]:
        words.append("state offloaded")
    if residence["head_slice_rows"] is not None:
        words.append("head in slices")
    return ", ".join(words)
