"""A directory is copied whole or not at all, and an attempt that was cut off or failed can be made again."""

from __future__ import annotations

import errno
import os
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from lopt_lite import files
from lopt_lite.errors import DoesNotFitError, LoptError, RunDirectoryError
from tests.training.operations import Operation, fail_at, kill_at, record, recorded, watch

#: Making sure of a directory that is there changes nothing, whether it works or not.
_HARMLESS = (("mkdir", "."), ("mkdir", "copy"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "templates" / "old").mkdir(parents=True)
    (directory / "weights").write_bytes(b"w" * 3000)
    (directory / "templates" / "tool_use.jinja").write_text("{{ messages }}")
    (directory / "templates" / "old" / "plain.jinja").write_text("")
    return directory


def content(directory: Path) -> dict[str, bytes | None]:
    """What is below a directory; None for directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def copy(source: Path, target: Path) -> None:
    files.copy_tree(source, target, what="the copy")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_copy_has_all_that_is_below_and_nothing_else_is_left(source, tmp_path, is_there):
    target = tmp_path / "new" / "copy"
    if is_there:
        target.mkdir(parents=True)
    copy(source, target)
    assert content(target) == content(source)
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_an_empty_directory_stays_the_one_it_was(source, tmp_path, monkeypatch):
    """It may be a mounted disk, or where the user is."""
    target = tmp_path / "copy"
    target.mkdir()
    before = target.stat().st_ino
    monkeypatch.chdir(target)
    copy(source, Path())
    assert content(Path()) == content(source)
    assert target.stat().st_ino == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_stays_a_link(source, tmp_path, is_there):
    if is_there:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "copy").symlink_to("elsewhere")
    copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").is_symlink()
    assert content(tmp_path / "elsewhere") == content(source)


@pytest.mark.parametrize("name", ["thesis.txt", "weights"])
def test_what_a_user_has_there_is_not_touched(source, tmp_path, name):
    target = tmp_path / "copy"
    target.mkdir()
    (target / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match="copy exists and is not an empty directory"):
        copy(source, target)
    assert content(target) == {name: b"precious"}
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        copy(source, target / name)


def test_a_user_s_file_beside_what_an_attempt_has_left_is_not_touched(source, tmp_path):
    target = tmp_path / "copy"
    (target / ".copy.tmp").mkdir(parents=True)
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        copy(source, target)
    assert (target / "thesis.txt").read_text() == "precious"


def test_a_directory_is_not_copied_into_itself(source):
    before = content(source)
    with pytest.raises(RunDirectoryError, match="lies in"):
        copy(source, source / "templates" / "copy")
    assert content(source) == before


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(9_000, 7_000, 2_000))
    with pytest.raises(DoesNotFitError, match=r"the copy needs 3,014 bytes .* 2,000 are free") as caught:
        copy(source, tmp_path / "copy")
    assert "--output" not in str(caught.value.fix)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- cut off, or failed, at every operation ----------------------------------------------------------------------------


def child_copies(source: Path, target: Path, prepare: Callable[[], None]) -> int:
    """Copy in a process of its own, which is told of as 0, 1 (an error was raised) or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 97
        try:
            prepare()
            copy(source, target)
            code = 0
        except LoptError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def operations_of_a_copy(source: Path, work: Path, *, is_there: bool) -> list[Operation]:
    (work / "reference").mkdir()
    target = place_for(work / "reference", is_there=is_there)
    log = work / "log"
    assert child_copies(source, target, lambda: watch(work / "reference", record(log))) == 0
    return [operation for operation in recorded(log) if (operation.name, operation.path) not in _HARMLESS]


def place_for(directory: Path, *, is_there: bool) -> Path:
    target = directory / "copy"
    if is_there:
        target.mkdir()
    return target


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_operation_the_next_attempt_makes_the_whole_copy(source, tmp_path, is_there, after):
    operations = operations_of_a_copy(source, tmp_path, is_there=is_there)
    assert len(operations) > 15
    wholes = 0
    for number, operation in enumerate(operations):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        target = place_for(work, is_there=is_there)
        code = child_copies(source, target, lambda: watch(work, kill_at(operation, after=after)))  # noqa: B023
        assert code == -signal.SIGKILL, operation
        if target.exists() and content(target) == content(source):
            wholes += 1  # only its directory's entry may not be on the disk yet
        else:
            if not is_there:
                assert not target.exists(), operation
            copy(source, target)
        assert content(target) == content(source), operation
        assert [path.name for path in work.iterdir()] == ["copy"], operation
    assert wholes <= 3


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_where_any_operation_fails_nothing_is_left_and_the_next_attempt_makes_the_whole_copy(
    source, tmp_path, is_there, number
):
    operations = operations_of_a_copy(source, tmp_path, is_there=is_there)
    failed = 0
    for index, operation in enumerate(operations):
        work = tmp_path / f"work-{index}"
        work.mkdir()
        target = place_for(work, is_there=is_there)
        code = child_copies(source, target, lambda: watch(work, fail_at(operation, number)))  # noqa: B023
        assert code in (0, 1), operation
        failed += code
        if target.exists() and content(target) == content(source):
            continue
        assert not target.exists() or not content(target), operation
        assert {path.name for path in work.iterdir()} <= {"copy"}, operation
        copy(source, target)
        assert content(target) == content(source), operation
    assert failed > 15
