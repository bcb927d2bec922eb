"""The journal: an append-only file of durable facts, the only source of "what is done".

One line of JSON is one fact. A line is appended and fsynced *after* the file it speaks of is durable, so a fact in the
journal can be relied on. A crash can cut the last line short; such a tail is dropped when the journal is opened, and so
is a whole last line that was damaged: without it the run is where it was before, and does again what it spoke of.

The last value of a line is a checksum of what is before it: a number that a disk has changed would otherwise change the
result. (Lines of earlier versions have none.)
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt_lite import files
from lopt_lite.errors import LoptError, RunDirectoryError
from lopt_lite.journal_facts import as_read, damage

Fact = dict[str, Any]

_SUM = "crc32"


def read_facts(path: Path) -> tuple[list[Fact], int]:
    """Facts of a journal and the byte length of its sound lines, without changing the file.

    Raises
    ------
    RunDirectoryError
        A line other than the last one is not what was written: no JSON object with a ``fact``, or one that does not say
        what facts of its name say. So is a last one that is whole, and says something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise files.unreadable(error, path, "the journal", RunDirectoryError) from error
    facts: list[Fact] = []
    length = 0
    lines = content.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            try:
                _check_sum(line)
                fact = json.loads(line)
            except (ValueError, RecursionError):
                if number > 1 and number == len(lines):
                    break
                raise
            if not isinstance(fact, dict) or not isinstance(fact.get("fact"), str):
                raise ValueError("not an object with a 'fact'")
            wrong = damage(fact)
            if wrong is not None:
                raise ValueError(wrong)
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(
                f"the journal {path} is damaged at line {number}: {error}",
                fix="start anew with --fresh, or restore the journal from a backup",
            ) from error
        fact.pop(_SUM, None)
        facts.append(as_read(fact))
        length += len(line) + 1
    return facts, length


def _check_sum(line: bytes) -> None:
    """Raises ValueError where a line with a checksum holds something else than what was written."""
    before, found, after = line.rpartition(f', "{_SUM}": '.encode())
    if found and after != json.dumps(_sum(before + b"}")).encode() + b"}":
        raise ValueError("its checksum is of something else")


def _sum(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def last_fact(facts: Sequence[Fact], name: str, **match: Any) -> Fact | None:
    """The newest of ``facts``, oldest first, with this name whose values equal ``match``, or None."""
    for entry in reversed(facts):
        if entry["fact"] == name and all(entry.get(k) == v for k, v in match.items()):
            return entry
    return None


class Journal:
    """An open journal.

    Parameters
    ----------
    path:
        The file; made when it is not there.

    Attributes
    ----------
    facts:
        What it says, oldest first.
    lost_last:
        Whether its last line, though whole, was damaged, and is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed: LoptError | None = None
        self.facts, self._whole_bytes = read_facts(path)
        self.lost_last = False
        if path.exists() and path.stat().st_size > self._whole_bytes:
            self.lost_last = b"\n" in path.read_bytes()[self._whole_bytes :]
            files.truncate(path, self._whole_bytes)
        self._file = files.open_lines(path)
        try:
            files.fsync_directory(path.parent)
        except OSError as error:
            raise files.explain_os_error(error, path, "open") from error

    def add(self, fact: str, **values: Any) -> None:
        """Append a fact; durable on return.

        Raises
        ------
        LoptError
            It cannot be written. What came of it is taken off again, so that no later fact follows half a line.
        """
        entry = {"fact": fact, **values}
        text = json.dumps(files.as_json(entry), allow_nan=False).encode()
        if self._failed is not None:
            raise self._failed
        try:
            files.append_line(self._file, {**entry, _SUM: _sum(text)})
        except LoptError:
            self._take_back()
            raise
        self._whole_bytes = os.fstat(self._file.fileno()).st_size
        self.facts.append(entry)

    def _take_back(self) -> None:
        """Cut off what came of a line that could not be written; without that, nothing may follow it any more."""
        try:
            files.truncate(self._path, self._whole_bytes)
        except LoptError as error:
            self._failed = error

    def last(self, fact: str, **match: Any) -> Fact | None:
        """The newest fact of this name whose values equal ``match``, or None."""
        return last_fact(self.facts, fact, **match)

    def all(self, fact: str, **match: Any) -> list[Fact]:
        """All facts of this name whose values equal ``match``, oldest first."""
        return [e for e in self.facts if e["fact"] == fact and all(e.get(k) == v for k, v in match.items())]

    def close(self) -> None:
        """Close the file. Every fact in it is durable, so that a failure to close it tells nothing more."""
        with contextlib.suppress(OSError):
            self._file.close()
