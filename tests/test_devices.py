"""Memory counters tell the truth about what happened between two looks, and limits reach the allocator."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lopt_lite import devices, freed_memory, host_memory
from lopt_lite.backends import CudaBackend, MpsBackend, backend
from lopt_lite.devices import PeakMemory, choose_device, host_rss_bytes
from lopt_lite.errors import SettingsError

MIB = 2**20
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process's peak")
def test_the_cpu_peak_includes_what_was_freed_before_the_look():
    peak = PeakMemory(torch.device("cpu"))
    before = host_rss_bytes()
    block = torch.ones(256 * MIB, dtype=torch.uint8)
    del block
    assert peak.read() >= before + 200 * MIB
    assert host_rss_bytes() < before + 200 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process's peak")
def test_a_reset_forgets_the_cpu_peak():
    peak = PeakMemory(CPU)
    before = peak.read()
    block = torch.ones(256 * MIB, dtype=torch.uint8)
    del block
    peak.reset()
    assert peak.read() < before + 100 * MIB


def test_where_the_system_keeps_no_peak_it_is_the_largest_size_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(host_memory, "_CLEAR_REFS", tmp_path / "no directory" / "none")
    sizes = iter([4, 5, 9, 7, 3, 2])
    monkeypatch.setattr(host_memory, "rss_bytes", lambda: next(sizes))
    peak = PeakMemory(CPU)
    assert [peak.read(), peak.read(), peak.read()] == [5, 9, 9]
    peak.reset()
    assert peak.read() == 3


def test_a_peak_of_long_ago_is_none_that_was_grown_to(tmp_path, monkeypatch):
    """Where the system keeps a peak and does not forget it."""
    status = tmp_path / "status"
    monkeypatch.setattr(host_memory, "_STATUS", status)
    monkeypatch.setattr(host_memory, "_CLEAR_REFS", tmp_path / "no directory" / "none")
    status.write_text("VmHWM:\t 900 kB\n")
    peak = PeakMemory(CPU)
    assert (peak.read(), peak.grown_to()) == (900 << 10, 0)
    status.write_text("VmHWM:\t 901 kB\n")
    assert (peak.read(), peak.grown_to()) == (901 << 10, 901 << 10)


def test_a_peak_begins_without_what_was_freed_before(monkeypatch):
    done = []
    monkeypatch.setattr(host_memory, "trim", lambda: done.append("trim"))
    monkeypatch.setattr(host_memory, "forget_peak", lambda: done.append("forget"))
    PeakMemory(CPU)
    assert done == ["trim", "forget"]


def test_the_cpu_counts_the_process_as_used_and_keeps_no_limit():
    assert devices.used_bytes(CPU) == pytest.approx(host_rss_bytes(), rel=0.1)
    assert devices.free_bytes(CPU) > 0
    assert not devices.set_memory_limit(CPU, 1)


def test_what_was_freed_is_given_back_before_the_process_is_measured(monkeypatch):
    """Or the smallest budget would depend on whether something has had it given back before."""
    done = []
    monkeypatch.setattr(host_memory, "trim", lambda: done.append("trim"))
    monkeypatch.setattr(host_memory, "rss_bytes", lambda: done.append("measure") or 300)
    assert devices.used_bytes(CPU) == 300
    assert done == ["trim", "measure"]


def test_the_cpu_has_nothing_to_copy():
    copies = devices.CopyStream(CPU)
    host = copies.host_buffer(64)
    assert copies.device_buffer(host) is host
    assert backend(CPU).new_stream() is None


def test_an_unknown_kind_of_device_is_refused():
    with pytest.raises(ValueError, match="meta"):
        backend(torch.device("meta"))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused_rather_than_taken_for_no_limit(limit: int):
    for kind in (backend(CPU), MpsBackend(torch.device("mps"))):
        with pytest.raises(ValueError, match="expected more than 0"):
            kind.set_memory_limit(limit)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """PyTorch's CUDA calls that need no device, noting what they were given."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: seen.update(fraction=fraction, device=device),
    )
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.update(reset=device))
    return seen


@pytest.mark.parametrize(("limit", "fraction"), [(250, 0.25), (1000, 1.0), (5000, 1.0), (None, 1.0)])
def test_the_cuda_limit_is_a_share_of_the_devices_memory(cuda: dict[str, Any], limit: int | None, fraction: float):
    assert devices.set_memory_limit(torch.device("cuda"), limit)
    assert cuda == {"fraction": fraction, "device": torch.device("cuda", 1)}
    assert isinstance(cuda["fraction"], float)


def test_a_limit_is_lifted_at_the_end_also_after_an_error(cuda: dict[str, Any]):
    device = torch.device("cuda")
    with pytest.raises(KeyError), devices.memory_limited(device, 250):
        assert cuda["fraction"] == 0.25
        raise KeyError
    assert cuda["fraction"] == 1.0
    cuda.clear()
    with devices.memory_limited(device, None):
        pass
    assert not cuda


@pytest.mark.parametrize(("name", "limit", "told"), [("cpu", 250, [250]), ("cpu", None, []), ("cuda", 250, [])])
def test_on_the_cpu_the_process_is_kept_at_the_limit(name, limit, told, cuda, monkeypatch: pytest.MonkeyPatch):
    lines: list[int] = []
    monkeypatch.setattr(
        freed_memory.FreedMemory, "keep_below", lambda freed, most: lines.append(most) if freed.watches else None
    )
    monkeypatch.setattr(host_memory, "has_glibc", lambda: True)
    with devices.memory_limited(torch.device(name), limit):
        assert lines == told


def test_the_cuda_peak_is_what_its_limit_counts(cuda: dict[str, Any]):
    device = torch.device("cuda")
    assert PeakMemory(device).read() == 70
    assert cuda["reset"] == torch.device("cuda", 1)
    assert backend(device).peak_live_bytes() == 60
    assert (devices.free_bytes(device), devices.used_bytes(device)) == (300, 0)


def test_a_cuda_device_keeps_its_number_in_other_threads(cuda: dict[str, Any]):
    assert CudaBackend(torch.device("cuda")).device == torch.device("cuda", 1)
    assert CudaBackend(torch.device("cuda", 3)).device == torch.device("cuda", 3)


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """PyTorch's MPS calls, noting what they were given."""
    seen: dict[str, Any] = {"driver": 50, "tensors": 20}
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: seen["driver"])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: seen["tensors"])
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", lambda fraction: seen.update(fraction=fraction))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000, total=24 * 2**30))
    monkeypatch.setenv("PYTORCH_MPS_LOW_WATERMARK_RATIO", "")
    monkeypatch.delenv("PYTORCH_MPS_LOW_WATERMARK_RATIO")
    return seen


@pytest.mark.parametrize(("limit", "fraction"), [(250, 0.25), (1500, 1.5), (5000, 2.0), (None, 1.7)])
def test_the_mps_limit_is_a_share_of_the_recommended_size(mps: dict[str, Any], limit: int | None, fraction: float):
    assert devices.set_memory_limit(torch.device("mps"), limit)
    assert mps["fraction"] == fraction
    assert isinstance(mps["fraction"], float)


def test_the_mps_peak_is_the_largest_size_seen_of_what_its_limit_counts(mps: dict[str, Any]):
    device = torch.device("mps")
    counters = backend(device)
    assert (counters.peak_bytes(), counters.peak_live_bytes()) == (50, 20)
    mps.update(driver=40, tensors=30)
    assert (counters.peak_bytes(), counters.peak_live_bytes()) == (50, 30)
    counters.reset_peak()
    assert counters.peak_bytes() == 40
    assert (devices.free_bytes(device), devices.used_bytes(device)) == (960, 0)


def test_what_an_apple_gpu_could_take_is_also_free_on_the_host(mps: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=300))
    assert devices.free_bytes(torch.device("mps")) == 300


@pytest.mark.parametrize(
    ("limit_gib", "mark"), [(0.5, "0.010"), (2, "0.047"), (9.25, "0.500"), (100, "1.400"), (None, None)]
)
def test_a_small_mps_limit_makes_the_allocator_careful_in_time(mps: dict[str, Any], limit_gib, mark):
    """Of 24 GiB, Metal is taken to recommend 16; the last 1.25 GiB before the limit are handled with care."""
    devices.set_memory_limit(torch.device("mps"), None if limit_gib is None else int(limit_gib * 2**30))
    assert os.environ.get("PYTORCH_MPS_LOW_WATERMARK_RATIO") == mark


def test_the_users_own_mark_stays(mps: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTORCH_MPS_LOW_WATERMARK_RATIO", "0.3")
    devices.set_memory_limit(torch.device("mps"), 2**30)
    assert os.environ["PYTORCH_MPS_LOW_WATERMARK_RATIO"] == "0.3"


@pytest.mark.parametrize(
    ("capability", "fuses", "lacks"), [((7, 5), False, True), ((8, 0), True, False), ((12, 0), True, False)]
)
def test_what_a_cuda_device_has_for_bfloat16(cuda: dict[str, Any], capability, fuses, lacks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = backend(torch.device("cuda"))
    assert device.fuses_attention(torch.bfloat16) == fuses
    assert device.fuses_attention(torch.float32)
    assert device.lacks_bfloat16() == lacks


def test_only_metal_has_no_attention_to_train_with(mps: dict[str, Any]):
    assert not backend(torch.device("mps")).fuses_attention(torch.float32)
    assert backend(CPU).fuses_attention(torch.bfloat16)


def test_a_budget_is_no_more_than_is_free_on_a_gpu(cuda: dict[str, Any]):
    assert backend(torch.device("cuda")).attainable_bytes(1000) == 350
    assert backend(torch.device("cuda")).attainable_bytes(200) == 200
    assert backend(CPU).attainable_bytes(2**60) == 2**60


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_and_auto_does_without(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=f"--device {name}"):
        choose_device(name)
    assert choose_device("auto") == CPU


def test_the_cpu_keeps_few_kernels_unless_the_user_says_otherwise(monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    monkeypatch.setenv(names[0], "7")
    monkeypatch.delenv(names[1], raising=False)
    devices.keep_few_kernels(torch.device("cuda"))
    assert names[1] not in os.environ
    devices.keep_few_kernels(CPU)
    assert [os.environ[name] for name in names] == ["7", "24"]
