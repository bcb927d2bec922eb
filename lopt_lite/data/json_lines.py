"""Reads JSON Lines one line at a time, in bounded memory, and says what is wrong with a line that cannot be used.

Nothing is raised for a bad line: whether it stops the run or is dropped is decided by :mod:`lopt_lite.data.load`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lopt_lite.errors import DataError
from lopt_lite.files import unreadable

#: A longer line is refused without being read into memory.
MAX_LINE_BYTES = 64 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DISCARD_CHUNK_BYTES = 2**20

_UNPACK = "unpack it first, e.g. with: {} FILE > NEW.jsonl"
_CONVERT = "convert it first, e.g. with pandas: {}(FILE).to_json('NEW.jsonl', orient='records', lines=True)"
#: Files that people have data in and that are no text: what they begin with, what they are, and what to do.
_FOREIGN_FILES = (
    (b"\x1f\x8b", "a gzip file", _UNPACK.format("gzip -dc")),
    (b"PK\x03\x04", "a zip file", _UNPACK.format("unzip -p")),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK.format("zstd -dc")),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK.format("xz -dc")),
    (b"BZh", "a bzip2 file", _UNPACK.format("bzip2 -dc")),
    (b"PAR1", "a Parquet file", _CONVERT.format("read_parquet")),
    (b"ARROW1", "an Arrow file", _CONVERT.format("read_feather")),
)


@dataclass(frozen=True)
class Line:
    """One line that is not blank: either ``record`` or ``problem`` is set.

    Attributes
    ----------
    number:
        Counted from 1, blank lines included.
    end_byte:
        Bytes of the file up to and including this line.
    record:
        The parsed JSON object.
    problem:
        What is wrong with the line, as the rest of a sentence that names it.
    """

    number: int
    end_byte: int
    record: dict[str, Any] | None
    problem: str | None


def read_json_lines(path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield every line of ``path`` that is not blank; a byte order mark and CRLF line ends are accepted.

    Raises
    ------
    DataError
        The file does not exist, is not a regular file, or cannot be read.
    """
    check_is_data_file(path)
    try:
        with open(path, "rb") as file:
            number = 0
            while raw := file.readline(max_line_bytes + 1):
                number += 1
                if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
                    _discard_rest_of_line(file)
                    problem = f"the line is longer than {max_line_bytes / 2**20:g} MiB"
                    yield Line(number, file.tell(), None, problem)
                    continue
                raw = raw.removeprefix(_BYTE_ORDER_MARK).strip()
                if raw:
                    record, problem_or_none = parse_line(raw)
                    yield Line(number, file.tell(), record, problem_or_none)
    except OSError as error:
        raise unreadable(error, path, "the data file", DataError) from error


def check_is_data_file(path: Path) -> None:
    """Refuse what is not a regular file, and what begins like a packed file or a table.

    Raises
    ------
    DataError
        Nothing is there, it is a directory or a device, it cannot be read, or it begins with the bytes of another kind.
    """
    if path.is_dir():
        raise DataError(f"the data file {path} is a directory", expected="a JSON Lines file")
    if not path.exists():
        raise DataError(f"the data file {path} does not exist", fix="check the path")
    if not path.is_file():
        raise DataError(f"the data file {path} is not a regular file", expected="a JSON Lines file")
    _check_is_no_foreign_file(path)


def _check_is_no_foreign_file(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            beginning = file.read(max(len(magic) for magic, _, _ in _FOREIGN_FILES))
    except OSError as error:
        raise unreadable(error, path, "the data file", DataError) from error
    for magic, kind, fix in _FOREIGN_FILES:
        if beginning.startswith(magic):
            raise DataError(
                f"the data file {path} looks like {kind}, by its first bytes",
                expected="a JSON Lines file: text, one JSON object per line",
                fix=fix,
            )


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """Parse one line; returns the object and None, or None and what is wrong."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = " (it looks like UTF-16: save the file as UTF-8)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return None, f"the line is not UTF-8 text, at its byte {error.start + 1}{hint}"
    value, problem = parse_json(text, "the line")
    if problem is not None:
        hint = " (JSON Lines has one object per line, not one array)" if text.startswith("[") else ""
        return None, problem + hint
    if not isinstance(value, dict):
        return None, f"the line is a JSON {json_type(value)}, not an object"
    return value, None


def parse_json(text: str, where: str) -> tuple[Any, str | None]:
    """Parse the text of ``where``; returns the value and None, or None and what is wrong."""
    try:
        value = json.loads(text)
    except RecursionError:
        return None, f"{where} is JSON that is nested too deeply"
    except json.JSONDecodeError as error:
        return None, f"{where} is not valid JSON: {error.msg} at column {error.colno}"
    except ValueError as error:  # an integer of more digits than Python converts
        return None, f"{where} is not usable JSON: {error}"
    # Only an escape can smuggle in half of a surrogate pair; it has no UTF-8 form, so no tokenizer takes it.
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, f"{where} has half of a surrogate pair (a lone \\ud800 to \\udfff), which is not a character"
        except RecursionError:
            return None, f"{where} is JSON that is nested too deeply"
    return value, None


def json_type(value: Any) -> str:
    """The JSON name of a parsed value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    return "array" if isinstance(value, list) else "object"


def _discard_rest_of_line(file: BinaryIO) -> None:
    while chunk := file.readline(_DISCARD_CHUNK_BYTES):
        if chunk.endswith(b"\n"):
            return
