"""The reader on files as people have them, and on broken ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_lite.data.estimate import estimate_data
from lopt_lite.data.json_lines import read_json_lines
from lopt_lite.errors import DataError
from tests.data.helpers import load, trained_runs, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer()
GOOD = {"question": "a", "answer": "b"}


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \t\n" + line + b"\r\n\xef\xbb\xbf" + line)
    assert [(found.number, found.record) for found in read_json_lines(path)] == [(1, GOOD), (4, GOOD), (5, GOOD)]
    dataset, report, notices = load(path, TOKENIZER)
    assert (len(dataset), report.lines, report.bad_lines, notices) == (3, 3, 0, [])


def test_unicode_in_any_notation_is_kept(tmp_path: Path) -> None:
    answer = "naïve 🙂 汉字 \u2028 \x85 \u202e"
    lines = [json.dumps({"question": "?", "answer": answer}, ensure_ascii=ascii) for ascii in (True, False)]
    dataset, _, _ = load(write_lines(tmp_path, *lines), TOKENIZER)
    for i in range(2):
        assert trained_runs(dataset, TOKENIZER, i) == [answer + "<|im_end|>"]


BAD_LINES = {
    "not JSON": (b'{"question": "a", ', "not valid JSON"),
    "an array": (b'[{"question": "a"}]', "a JSON array, not an object"),
    "the first line of a pretty-printed array": (b"[", "one object per line, not one array"),
    "a number": (b"7", "a JSON number, not an object"),
    "null": (b"null", "a JSON null, not an object"),
    "bad UTF-8": (b'{"question": "\xff", "answer": "b"}', "not UTF-8 text, at its byte 15"),
    "UTF-16": (b"\xff\xfe{\x00}\x00", "UTF-16"),
    "half a surrogate pair": (rb'{"question": "a", "answer": "\ud800 b"}', "surrogate"),
    "half a surrogate pair in capitals": (rb'{"question": "a", "answer": "\uDC00"}', "surrogate"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "an endless number": (b'{"question": 1' + b"0" * 10_000 + b"}", "not usable JSON"),
    "no known keys": (b'{"foo": 1, "bar": 2}', "the keys 'foo', 'bar'; known are messages"),
    "no keys": (b"{}", "(none)"),
    "a null answer": (b'{"question": "a", "answer": null}', "'answer' is a JSON null, not a string"),
    "a number for an answer": (b'{"question": "a", "answer": 4}', "'answer' is a JSON number"),
    "mixed prompt and completion": (b'{"prompt": "a", "completion": []}', "not two strings or two lists"),
    "messages null": (b'{"messages": null}', "'messages' is a JSON null"),
    "messages empty": (b'{"messages": []}', "empty list"),
    "a message that is text": (b'{"messages": ["hi"]}', "messages[0] is a JSON string, not an object"),
    "a message without a role": (b'{"messages": [{"content": "a"}]}', "messages[0] has no string 'role'"),
    "an unknown role": (b'{"messages": [{"role": "wizard", "content": "a"}]}', "'role' 'wizard'; known are system"),
    "no content": (b'{"messages": [{"role": "user"}]}', "messages[0].content is missing or null, not text"),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
        "part of type 'image_url'",
    ),
    "no value": (b'{"conversations": [{"from": "human"}]}', "conversations[0].value is missing"),
}


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_stops_with_file_line_and_reason(line: bytes, problem: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, b"", line, name="broken.jsonl")
    with pytest.raises(DataError) as caught:
        load(path, TOKENIZER)
    assert "broken.jsonl, line 2: " in caught.value.found
    assert problem in caught.value.found
    assert "--skip-bad-lines" in (caught.value.fix or "")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_lines_are_dropped_and_counted_when_asked(line: bytes, problem: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, line, GOOD, line, GOOD)
    dataset, report, notices = load(path, TOKENIZER, skip_bad_lines=True)
    assert (len(dataset), report.lines, report.bad_lines, report.format) == (2, 4, 2, "question+answer")
    assert report.first_bad_lines == [1, 3]
    assert any("2 of 4 lines cannot be used and were dropped (lines 1, 3); line 1:" in text for text in notices)
    with pytest.raises(DataError, match=r"none of the 1 lines of .* can be used; line 1: "):
        load(write_lines(tmp_path, line), TOKENIZER, skip_bad_lines=True)


def test_a_mixed_file_is_refused_with_the_line_and_both_formats(tmp_path: Path) -> None:
    path = write_lines(tmp_path, GOOD, GOOD, {"text": "plain"}, {"foo": 1})
    with pytest.raises(DataError, match=r"line 3: the line has the format 'text', and the file has 'question\+answer'"):
        load(path, TOKENIZER)
    _, report, _ = load(path, TOKENIZER, skip_bad_lines=True)
    assert report.first_bad_lines == [3, 4]


def test_a_line_of_the_files_format_may_have_the_keys_of_another_too(tmp_path: Path) -> None:
    both = {**GOOD, "messages": [{"role": "user", "content": "x"}], "text": "y"}
    dataset, report, _ = load(write_lines(tmp_path, GOOD, both), TOKENIZER)
    assert (report.format, len(dataset)) == ("question+answer", 2)


def test_a_very_long_line_is_read_and_one_beyond_the_bound_is_not(tmp_path: Path) -> None:
    long = {"question": "a", "answer": "two plus " * 100_000}
    path = write_lines(tmp_path, long, GOOD)
    dataset, report, _ = load(path, TOKENIZER, max_length=64)
    assert (len(dataset), report.cut) == (2, 1)
    lines = list(read_json_lines(path, max_line_bytes=1000))
    assert lines[0].record is None and "longer than" in (lines[0].problem or "")
    assert (lines[1].number, lines[1].record) == (2, GOOD)
    assert lines[1].end_byte == path.stat().st_size


def test_a_line_of_exactly_the_bound_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path, GOOD, GOOD)
    length = len(json.dumps(GOOD))
    assert all(line.record == GOOD for line in read_json_lines(path, max_line_bytes=length))
    assert all(line.problem for line in read_json_lines(path, max_line_bytes=length - 1))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "missing.jsonl", TOKENIZER)
    with pytest.raises(DataError, match="is a directory"):
        load(tmp_path, TOKENIZER)
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="is empty"):
            load(tmp_path / "empty.jsonl", TOKENIZER)


FOREIGN_FILES = {
    "gzip": (gzip.compress(b'{"text": "a"}\n'), "a gzip file", "gzip -dc"),
    "zip": (b"PK\x03\x04\x14\x00", "a zip file", "unzip -p"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58", "a zstd file", "zstd -dc"),
    "xz": (lzma.compress(b'{"text": "a"}\n'), "an xz file", "xz -dc"),
    "bzip2": (bz2.compress(b'{"text": "a"}\n'), "a bzip2 file", "bzip2 -dc"),
    "Parquet": (b"PAR1\x15\x04", "a Parquet file", "lines=True"),
    "Arrow": (b"ARROW1\x00\x00", "an Arrow file", "lines=True"),
}


@pytest.mark.parametrize(("content", "kind", "fix"), FOREIGN_FILES.values(), ids=FOREIGN_FILES.keys())
def test_packed_files_and_tables_are_told_by_their_first_bytes(
    content: bytes, kind: str, fix: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    for refuse in (
        lambda: load(path, TOKENIZER),
        lambda: load(path, TOKENIZER, skip_bad_lines=True),
        lambda: next(read_json_lines(path)),
        lambda: estimate_data(path, None, max_length=100),
    ):
        with pytest.raises(DataError) as caught:
            refuse()
        assert f"data.jsonl looks like {kind}" in caught.value.found
        assert "one JSON object per line" in (caught.value.expected or "")
        assert fix in (caught.value.fix or "")


def test_a_file_that_is_shorter_than_what_others_begin_with_is_read(tmp_path: Path) -> None:
    assert [line.record for line in read_json_lines(write_lines(tmp_path, b"{}"))] == [{}]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "text",
    ]
)
TURN = st.dictionaries(st.sampled_from(["role", "from", "content", "value", "tool_calls"]), JSON_VALUES)
RECORDS = st.dictionaries(KEYS, JSON_VALUES | st.lists(TURN, max_size=2), max_size=4)
LINES = st.one_of(st.binary(max_size=30), RECORDS.map(lambda record: json.dumps(record).encode()))


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=5))
def test_no_content_gets_past_the_reader_as_another_error(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = write_lines(Path(directory), *lines, GOOD)
        try:
            dataset, report, _ = load(path, TOKENIZER, skip_bad_lines=True)
        except DataError:
            return
        assert report.examples == len(dataset) > 0
        assert report.lines == report.examples + report.dropped + report.bad_lines
        assert bool((dataset.target_counts > 0).all())
