"""Measuring the machine, and remembering what came of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from lopt_lite import user_cache
from lopt_lite.residency import machine
from lopt_lite.residency.machine import MachineSpeeds, machine_speeds

CPU = torch.device("cpu")

SPEEDS = MachineSpeeds(
    bfloat16_flops=4e12,
    float32_flops=1e12,
    elementwise_bytes_per_s=1e11,
    fresh_bytes_per_s=1e10,
    operation_s=1e-6,
    read_bytes_per_s=1e9,
    cached_read_bytes_per_s=1e10,
    write_bytes_per_s=5e8,
    to_device_bytes_per_s=None,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[MachineSpeeds]:
    """What the next measurements find; used up one by one."""
    coming = [SPEEDS] * 10
    monkeypatch.setattr(machine, "measure", lambda device, nf4=False: coming.pop(0))
    return coming


def test_measuring_gives_numbers_that_make_sense_in_well_under_a_second():
    def seconds() -> float:
        started = time.process_time()
        speeds = machine.measure(CPU)
        took = time.process_time() - started
        for field in dataclasses.fields(speeds):
            value = getattr(speeds, field.name)
            assert value is None or value > 0
        assert speeds.to_device_bytes_per_s is None and speeds.dequantise_bytes_per_s is None
        assert 1e6 < speeds.read_bytes_per_s < 1e12
        assert 1e8 < speeds.float32_flops < 1e15
        return took

    # The best of several: a busy machine slows some down.
    assert min(seconds() for _ in range(3)) < 1.0


def test_nf4_is_measured_when_asked_for():
    speeds = machine.measure(CPU, nf4=True)
    assert speeds.dequantise_bytes_per_s > speeds.quantise_bytes_per_s > 0


def test_a_few_uses_measure_and_the_best_of_each_is_kept(cache, measurements):
    measurements[:3] = [
        SPEEDS,
        dataclasses.replace(SPEEDS, float32_flops=2e12, operation_s=5e-6),
        dataclasses.replace(SPEEDS, float32_flops=1e9, operation_s=5e-7),
    ]
    for _ in range(5):
        speeds = machine_speeds(CPU)
    assert len(measurements) == 7
    assert speeds == dataclasses.replace(SPEEDS, float32_flops=2e12, operation_s=5e-7)


def test_nf4_speeds_are_added_to_what_is_remembered(cache, measurements):
    for _ in range(4):
        machine_speeds(CPU)
    measurements[0] = dataclasses.replace(SPEEDS, dequantise_bytes_per_s=2e9, quantise_bytes_per_s=1e8)
    assert machine_speeds(CPU, nf4=True).dequantise_bytes_per_s == 2e9
    assert machine_speeds(CPU).dequantise_bytes_per_s == 2e9
    assert len(measurements) == 6


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"measurements": 3, "speeds": {}}}', '{"KEY": {"measurements": 3}}'],
)
def test_what_cannot_be_understood_is_measured_anew(cache, measurements, content):
    cache.mkdir()
    (cache / machine.FILE_NAME).write_text(content.replace("KEY", machine.machine_key(CPU)), encoding="utf-8")
    assert machine_speeds(CPU) == SPEEDS
    assert len(measurements) == 9


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "fast", None, True])
def test_numbers_that_make_no_sense_are_measured_anew(cache, measurements, value):
    speeds = {**dataclasses.asdict(SPEEDS), "read_bytes_per_s": value}
    user_cache.remember(machine.FILE_NAME, machine.machine_key(CPU), {"measurements": 3, "speeds": speeds})
    assert machine_speeds(CPU) == SPEEDS


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, measurements):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert machine_speeds(CPU) == SPEEDS
    assert not user_cache.remember("x.json", "key", 1)


def test_measuring_works_without_a_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "missing"))
    assert machine.measure(CPU).write_bytes_per_s > 0
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("refusing", ["the cache", "both"])
def test_measuring_works_where_no_file_can_be_made(tmp_path, monkeypatch, refusing):
    """Another directory is taken; where that refuses files too, a slow disk is assumed."""
    original = tempfile.TemporaryFile

    def refuse(*args, dir, **kwargs):
        if dir == tmp_path or refusing == "both":
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = machine._file_speeds(tmp_path)
    assert min(found) > 0
    assert (found == machine._SLOW_DISK) is (refusing == "both")


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("LOPT_LITE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert user_cache.user_cache_directory() is None
    assert not user_cache.remember("x.json", "key", 1)
    assert user_cache.recall("x.json", "key") is None


def test_another_number_of_threads_is_another_machine(monkeypatch):
    here = machine.machine_key(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert machine.machine_key(CPU) != here


def test_only_the_newest_entries_are_kept(cache):
    for number in range(40):
        user_cache.remember("x.json", str(number), number)
    kept = json.loads((cache / "x.json").read_text())
    assert list(kept.values()) == list(range(8, 40))


def test_the_cache_is_where_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LOPT_LITE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache.user_cache_directory() == tmp_path / "xdg" / "lopt-lite"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache.user_cache_directory() == tmp_path / ".cache" / "lopt-lite"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache.user_cache_directory() == tmp_path / "Library" / "Caches" / "lopt-lite"


def test_loading_is_as_fast_as_its_slower_half():
    gpu = dataclasses.replace(SPEEDS, to_device_bytes_per_s=5e9)
    assert gpu.load_bytes_per_s(cached=True) == 5e9
    assert gpu.load_bytes_per_s(cached=False) == 1e9
    assert SPEEDS.load_bytes_per_s(cached=True) == 1e10
