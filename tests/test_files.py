"""Durable files: whole or not at all, and errors of the disk say what to do."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lopt_lite import files
from lopt_lite.errors import DataError, DoesNotFitError, RunDirectoryError, SettingsError


class _Crash(BaseException):
    """Stands for the end of the process."""


def _raise(error: BaseException):
    def call(*arguments: object, **named: object) -> None:
        raise error

    return call


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# -- atomic replacement -----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_block_ends(old):
    with files.atomic_writer(old) as file:
        file.write(b"new, and longer")
        assert old.read_bytes() == b"old", "not before the end"
    assert old.read_bytes() == b"new, and longer"
    assert _names(old.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), _Crash()])
def test_an_exception_in_the_block_leaves_the_old_file_and_no_temporary(old, error):
    with pytest.raises(type(error)), files.atomic_writer(old) as file:
        file.write(b"half")
        raise error
    assert old.read_bytes() == b"old"
    assert _names(old.parent) == ["file.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_call_leaves_the_old_file(old, monkeypatch, call):
    monkeypatch.setattr(files.os, call, _raise(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RunDirectoryError, match=r"cannot write .*file\.bin: Input/output error"):
        files.write_bytes(old, b"new")
    assert old.read_bytes() == b"old"
    assert _names(old.parent) == ["file.bin"]


def test_content_is_on_the_disk_before_the_name_changes_and_the_name_before_the_return(old, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def recording_replace(source: object, target: object) -> None:
        calls.append("name")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", recording_fsync)
    monkeypatch.setattr(files.os, "replace", recording_replace)
    files.write_bytes(old, b"new")
    assert calls == ["content", "name", "directory"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_does_not_fit_and_names_file_and_free_space(old, monkeypatch, number):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.os, "fsync", _raise(OSError(number, os.strerror(number))))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10_000, 8_766, 1_234))
    with pytest.raises(DoesNotFitError) as caught:
        files.write_bytes(old, b"new")
    assert "the disk is full" in caught.value.found
    assert str(old) in caught.value.found
    assert "1,234 bytes" in caught.value.found
    assert "same command again" in caught.value.fix
    assert old.read_bytes() == b"old"


def test_a_directory_that_is_not_there_is_an_error_of_the_run_directory(tmp_path):
    with pytest.raises(RunDirectoryError, match="No such file"):
        files.write_bytes(tmp_path / "none" / "file", b"x")


# -- what a crash leaves ----------------------------------------------------------------------------------------------


def test_stray_temporaries_are_removed_at_any_depth_and_nothing_else(tmp_path):
    deep = tmp_path / "cache" / "block-01"
    deep.mkdir(parents=True)
    stray = [files.temporary_name(tmp_path / "settings.json"), files.temporary_name(deep / "shard.safetensors")]
    kept = [tmp_path / "notes.tmp", tmp_path / ".hidden", deep / "shard.safetensors", tmp_path / "journal.jsonl"]
    for path in stray + kept:
        path.write_bytes(b"x")
    (tmp_path / ".directory.tmp").mkdir()
    link = tmp_path / ".link.tmp"
    link.symlink_to(kept[0])
    assert files.remove_stray_temporaries(tmp_path) == 2
    assert not any(path.exists() for path in stray)
    assert all(path.exists() for path in kept)
    assert link.is_symlink()
    assert (tmp_path / ".directory.tmp").is_dir()
    assert files.remove_stray_temporaries(tmp_path) == 0


def test_a_stray_temporary_of_a_killed_writer_does_not_disturb_the_next_one(old):
    files.temporary_name(old).write_bytes(b"a longer torn content of a process that was killed")
    files.write_bytes(old, b"new")
    assert old.read_bytes() == b"new"
    assert _names(old.parent) == ["file.bin"]


# -- JSON and lines ---------------------------------------------------------------------------------------------------


def test_json_comes_back(tmp_path):
    value = {"größe": [1, 2.5, None, True], "text": "a\nb\u2028"}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json", what="x", error=DataError) == value


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EACCES, "right to read"), (errno.ENOENT, "where it went"), (errno.EIO, "check the disk")],
)
def test_what_cannot_be_read_is_told_with_what_helps(tmp_path, number, said):
    error = files.unreadable(OSError(number, os.strerror(number)), tmp_path / "x", "the recipe", DataError)
    assert isinstance(error, DataError)
    assert f"the recipe {tmp_path / 'x'}: {os.strerror(number)}" in error.found
    assert error.expected
    assert said in error.fix
    # Rights that are missing are no reason to begin anew.
    error = files.unreadable(OSError(number, ""), tmp_path / "x", "the recipe", DataError, "bake it again")
    assert ("bake it again" in error.fix) == (number != errno.EACCES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not UTF-8 text"),
        (None, "cannot read"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_json_that_cannot_be_read_becomes_the_callers_error(tmp_path, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        files.read_json(path, what="the recipe", error=DataError, fix="bake it again")
    assert f"the recipe {path}" in caught.value.found
    assert caught.value.fix == "bake it again"


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "x.json", what="x", error=DataError) == {"a": 1}


@pytest.mark.parametrize("durable", [True, False])
def test_a_line_is_in_the_file_at_once_and_on_the_disk_if_durable(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    with files.open_lines(tmp_path / "lines") as file:
        # Names of files may hold bytes that are no text.
        files.append_line(file, {"text": "a\nb", "ü": "\udce9"}, durable=durable)
        content = (tmp_path / "lines").read_bytes()
        assert content == b'{"text": "a\\nb", "\\u00fc": "\\udce9"}\n'
        assert len(synced) == int(durable)


def test_a_line_that_does_not_fit_is_said():
    class Full(io.BytesIO):
        name = "lines.jsonl"

        def write(self, line: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DoesNotFitError, match=r"cannot append to lines\.jsonl"):
        files.append_line(Full(), {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_could_not_be_written_is_not_tried_again_on_closing():
    file = files.open_lines(Path("/dev/full"))
    with pytest.raises(DoesNotFitError, match="cannot append to /dev/full"):
        files.append_line(file, {})
    file.close()


def test_a_line_of_which_only_a_part_is_taken_is_written_in_parts(tmp_path):
    class Slow(io.BytesIO):
        name = "lines.jsonl"

        def write(self, line: Any) -> int:
            return super().write(bytes(line)[:3])

    file = Slow()
    files.append_line(file, {"fact": "started"}, durable=False)
    assert file.getvalue() == b'{"fact": "started"}\n'


def test_a_file_is_cut(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    files.truncate(tmp_path / "x", 4)
    assert (tmp_path / "x").read_bytes() == b"0123"
    with pytest.raises(RunDirectoryError, match="cannot repair"):
        files.truncate(tmp_path / "none", 0)


# -- copying and deleting ---------------------------------------------------------------------------------------------


def test_a_copy_has_the_content_and_failing_leaves_the_old_target(tmp_path, old):
    source = tmp_path / "source"
    source.write_bytes(b"content" * 1000)
    files.copy_file(source, old)
    assert old.read_bytes() == source.read_bytes()
    with pytest.raises(RunDirectoryError, match=r"cannot copy .*none"):
        files.copy_file(tmp_path / "none", old)
    assert old.read_bytes() == source.read_bytes()
    assert _names(tmp_path) == ["file.bin", "source"]


def test_deleting_what_is_not_there_is_fine(tmp_path, old):
    files.remove_file(old)
    files.remove_file(old)
    files.remove_file(tmp_path / "none" / "file")
    files.remove_tree(tmp_path / "none")
    assert _names(tmp_path) == []


def test_a_link_to_a_directory_is_deleted_and_not_what_it_names(tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    (target / "weights").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(target)
    files.remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (target / "weights").read_bytes() == b"precious"
    files.remove_tree(target)
    assert not target.exists()


# -- directories and space --------------------------------------------------------------------------------------------


def test_directories_are_made_with_parents_and_may_be_there_already(tmp_path):
    files.make_directory(tmp_path / "a" / "b")
    files.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_where_a_directory_should_be_is_an_error_of_the_run_directory(old):
    with pytest.raises(RunDirectoryError, match="cannot create the directory"):
        files.make_directory(old / "x")


def test_a_directory_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RunDirectoryError, match="is not writable"):
        files.make_directory(tmp_path)


def test_bytes_of_a_directory_are_those_of_its_files(tmp_path):
    assert files.directory_bytes(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"4567")
    assert files.directory_bytes(tmp_path) == 7
    assert files.directory_bytes(tmp_path, without=tmp_path / "a") == 4
    assert files.directory_bytes(tmp_path / "a", without=tmp_path) == 0


def test_what_vanishes_while_a_directory_is_counted_is_not_counted(tmp_path, monkeypatch):
    (tmp_path / "stays").write_bytes(b"123")
    listing = [(str(tmp_path), ["gone"], ["stays", "gone-too"])]
    monkeypatch.setattr(files.os, "walk", lambda path: iter(listing))
    assert files.directory_bytes(tmp_path) == 3


def test_work_that_the_disk_cannot_hold_is_refused_before_it_starts(tmp_path):
    files.require_free_space(tmp_path / "not" / "made", 1, what="the store")
    with pytest.raises(DoesNotFitError, match=r"the store needs 1,000,000,000,000,000,000 bytes") as caught:
        files.require_free_space(tmp_path, 10**18, what="the store")
    assert "--output" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2", "HuggingFaceTB-SmolLM2"),
        ("a b\tc", "a-b-c"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("../../etc", "etc"),
        ('x:*?"<>|y', "x-------y"),
        ("modèle", "modèle"),
        ("a\0b", "a-b"),
    ],
)
def test_a_safe_name_is_one_component_anywhere(text, expected):
    assert files.safe_name(text) == expected


def test_a_name_that_is_too_long_is_a_matter_of_settings(tmp_path):
    error = files.explain_os_error(OSError(errno.ENAMETOOLONG, "File name too long"), tmp_path / ("x" * 300), "create")
    assert isinstance(error, SettingsError)
    assert "too long for the file system" in error.found
