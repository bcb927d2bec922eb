"""Equal runs count as equally large, however their processes' sizes differ by a little."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt_lite.residency.process_size import FILE_NAME, steady_size

MIB = 2**20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_sizes_that_are_close_count_as_the_first_one_seen():
    first = steady_size(467 * MIB + 5)
    assert first == 469 * MIB
    for measured in (466 * MIB, 467 * MIB, 468 * MIB + 123, 469 * MIB + 999):
        assert steady_size(measured) == first


def test_another_size_counts_for_itself_and_does_not_disturb_the_first():
    first, larger, smaller = steady_size(467 * MIB), steady_size(900 * MIB), steady_size(300 * MIB)
    assert (first, larger, smaller) == (468 * MIB, 901 * MIB, 301 * MIB)
    assert steady_size(466 * MIB) == first


def test_a_size_is_never_taken_for_much_less_than_it_is():
    known = steady_size(500 * MIB)
    for above in range(0, 4 * MIB, MIB // 8):
        assert steady_size(known + above) >= known + above - MIB


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "not json"])
def test_what_is_remembered_may_be_broken(cache: Path, content: str):
    cache.mkdir()
    (cache / FILE_NAME).write_text(content)
    assert steady_size(100 * MIB) == 101 * MIB


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "file"))
    assert steady_size(100 * MIB) == steady_size(100 * MIB) == 101 * MIB
