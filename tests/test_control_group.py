"""Memory that a control group leaves: files of both versions, as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from lopt_lite import control_group, devices

GIB = 1 << 30


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control_group, "_MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(control_group, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "cgroup"


def _group(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("_", ".", 1)).write_text(text + "\n")


def test_the_group_with_the_least_left_counts_and_caches_are_free(mount: Path, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/user/job\n")
    _group(
        mount / "user", memory_max=str(9 * GIB), memory_high="max", memory_current=str(7 * GIB), memory_stat="anon 5"
    )
    stat = f"anon 5\ninactive_file {GIB}\nactive_file 3"
    _group(mount / "user" / "job", memory_max=str(4 * GIB), memory_current=str(2 * GIB), memory_stat=stat)
    assert control_group.left_bytes() == 2 * GIB
    (mount / "user" / "job" / "memory.high").write_text(str(3 * GIB))
    assert control_group.left_bytes() == 2 * GIB
    (mount / "user" / "memory.max").write_text("max")
    assert control_group.left_bytes() == 2 * GIB
    (mount / "user" / "job" / "memory.high").write_text("max")
    assert control_group.left_bytes() == 3 * GIB
    (mount / "user" / "job" / "memory.current").write_text(str(6 * GIB))
    assert control_group.left_bytes() == 0


def test_in_a_container_the_group_is_the_root_that_is_seen(mount: Path, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/host/docker/4f2a\n")
    _group(mount, memory_max=str(4 * GIB), memory_current=str(GIB), memory_stat="inactive_file 0")
    assert control_group.left_bytes() == 3 * GIB


def test_the_first_version_has_a_directory_for_memory(mount: Path, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("5:devices:/\n4:cpu,memory:/job\n0::/\n")
    stat = f"inactive_file 7\ntotal_inactive_file {GIB}"
    directory = mount / "memory" / "job"
    _group(directory, memory_limit_in_bytes=str(4 * GIB), memory_usage_in_bytes=str(2 * GIB), memory_stat=stat)
    assert control_group.left_bytes() == 3 * GIB


@pytest.mark.parametrize("membership", [None, "", "0::/\n", "3:cpuset:/\n", "nonsense"])
def test_without_limits_there_is_none(mount: Path, tmp_path: Path, membership: str | None) -> None:
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    mount.mkdir()
    assert control_group.left_bytes() is None


@pytest.mark.parametrize("damaged", ["memory.current", "memory.stat", "memory.max"])
def test_files_that_say_nothing_limit_nothing(mount: Path, tmp_path: Path, damaged: str) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    _group(mount, memory_max=str(4 * GIB), memory_current=str(GIB), memory_stat="inactive_file 0")
    (mount / damaged).write_text("?")
    assert control_group.left_bytes() is None


def test_what_is_free_is_no_more_than_the_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory().available
    monkeypatch.setattr(control_group, "left_bytes", lambda: 12345)
    assert devices.free_bytes(torch.device("cpu")) == 12345
    monkeypatch.setattr(control_group, "left_bytes", lambda: None)
    assert devices.free_bytes(torch.device("cpu")) == pytest.approx(available, rel=0.3)
