"""On a CUDA device: real streams keep order, the limit is a limit, and training is what it is elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lopt_lite import devices
from lopt_lite.checkpoints.local_mask import LocalMask
from lopt_lite.checkpoints.store import Place, ShardView
from lopt_lite.devices import CopyStream, PeakMemory, backend
from lopt_lite.residency.slabs import ShardStream
from tests.cuda.gpu_checks import MIB, Runs, largest_relative_difference, layer_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
#: A few tens of milliseconds of a kernel that does nothing, in clock cycles.
SLOW_CYCLES = 50_000_000
SLAB_BYTES = 8 * MIB


@pytest.fixture(autouse=True)
def no_limit_is_left() -> Iterator[None]:
    """The limit belongs to the process: lift what a test has set."""
    yield
    devices.set_memory_limit(CUDA, None)
    devices.release_cached_memory(CUDA)


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """Attention by matrix products: the fused kernels' backward passes add up in an order that varies."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def test_computing_waits_for_the_copy_of_its_slab() -> None:
    copies = CopyStream(CUDA)
    host = copies.host_buffer(SLAB_BYTES)
    assert host.is_pinned()
    device = copies.device_buffer(host)
    for value in range(1, 5):
        copies.wait_until_unused(0)
        host.fill_(value)
        with torch.cuda.stream(copies._stream):
            torch.cuda._sleep(SLOW_CYCLES)  # the copy is late
        copies.copy(0, host, device)
        copies.wait_for_copy(0)
        total = device.sum(dtype=torch.int64)
        copies.mark_used(0)
        assert int(total) == value * SLAB_BYTES
    copies.close()


def test_a_copy_waits_for_the_computing_that_uses_its_slab() -> None:
    copies = CopyStream(CUDA)
    host = copies.host_buffer(SLAB_BYTES)
    device = copies.device_buffer(host)
    totals = []
    for value in range(1, 5):
        copies.wait_until_unused(0)
        host.fill_(value)
        copies.copy(0, host, device)
        copies.wait_for_copy(0)
        torch.cuda._sleep(SLOW_CYCLES)  # the computing is late
        totals.append(device.sum(dtype=torch.int64))
        copies.mark_used(0)
    copies.close()
    assert [int(total) for total in totals] == [value * SLAB_BYTES for value in range(1, 5)]


def test_the_first_copy_waits_for_computing_with_what_was_in_its_memory() -> None:
    copies = CopyStream(CUDA)
    host = copies.host_buffer(SLAB_BYTES)
    host.fill_(7)
    before = torch.full((SLAB_BYTES,), 3, dtype=torch.uint8, device=CUDA)
    torch.cuda._sleep(SLOW_CYCLES)
    total = before.sum(dtype=torch.int64)
    address = before.data_ptr()
    del before
    device = copies.device_buffer(host)
    copies.copy(0, host, device)
    if device.data_ptr() != address:
        pytest.skip("the allocator did not hand out the same memory again")
    assert int(total) == 3 * SLAB_BYTES
    copies.close()


@pytest.mark.parametrize("late", ["copy", "computing", "neither"])
def test_a_stream_of_shards_gives_the_right_bytes_on_real_streams(late: str) -> None:
    def view(index: int) -> ShardView:
        def read_into(buffer: torch.Tensor) -> None:
            assert threading.current_thread() is not threading.main_thread()
            buffer.fill_(index + 1)

        return ShardView(SLAB_BYTES, {"a": Place(0, SLAB_BYTES, torch.uint8, (SLAB_BYTES,))}, read_into)

    class LateCopies(CopyStream):
        def copy(self, slab: int, host: torch.Tensor, device: torch.Tensor) -> None:
            if late == "copy":
                with torch.cuda.stream(self._stream):
                    torch.cuda._sleep(SLOW_CYCLES)
            super().copy(slab, host, device)

    stream = ShardStream({index: view(index) for index in range(4)}, device=CUDA, copies=LateCopies(CUDA))
    order = [0, 1, 2, 3, 2, 1, 0] * 2
    totals = []
    for position, index in enumerate(order):
        with stream.item(index, order[position + 1 :]) as tensors:
            if late == "computing":
                torch.cuda._sleep(SLOW_CYCLES)
            totals.append(tensors["a"].sum(dtype=torch.int64))
    stream.close()
    assert [int(total) for total in totals] == [(index + 1) * SLAB_BYTES for index in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_nearby_tokens_is_attention_with_the_dense_mask(dtype: torch.dtype) -> None:
    mask = LocalMask(torch.Size((2, 1, 333, 333)), 100, chunked=False, device=CUDA)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, 333, 32, generator=generator).to(CUDA, dtype).double() for _ in range(3)]
    found = [tensor.to(dtype).requires_grad_() for tensor in exact]
    for tensor in exact:
        tensor.requires_grad_()
    attention = torch.nn.functional.scaled_dot_product_attention
    for inputs, given in ((exact, mask.dense()), (found, mask)):
        attention(*inputs, attn_mask=given).pow(2).sum().backward()
    for one, other in zip(found, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        error = (one.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_limit_is_kept_and_can_be_lifted() -> None:
    devices.release_cached_memory(CUDA)
    limit_bytes = torch.cuda.memory_reserved(CUDA) + 256 * MIB
    assert devices.set_memory_limit(CUDA, limit_bytes)
    peak = PeakMemory(CUDA)
    kept = torch.empty(200 * MIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(100 * MIB, dtype=torch.uint8, device=CUDA)
    assert 200 * MIB <= peak.read() <= limit_bytes
    devices.set_memory_limit(CUDA, None)
    assert torch.empty(100 * MIB, dtype=torch.uint8, device=CUDA).numel() + kept.numel() == 300 * MIB


def test_the_peak_includes_what_was_freed_before_the_look() -> None:
    peak = PeakMemory(CUDA)
    block = torch.empty(512 * MIB, dtype=torch.uint8, device=CUDA)
    del block
    devices.release_cached_memory(CUDA)
    assert peak.read() >= 512 * MIB
    assert backend(CUDA).peak_live_bytes() >= 512 * MIB


@pytest.mark.parametrize(("quantize", "dtype", "tolerance"), [("nf4", "bfloat16", 1e-3), ("none", "float32", 1e-6)])
def test_streamed_gradients_are_the_resident_ones(
    quantize: str, dtype: str, tolerance: float, tmp_path: Path, plain_attention: None
) -> None:
    """The same kernels on the same numbers; the tolerance is for libraries that choose kernels by address."""
    expected, found = layer_gradients(tmp_path, CUDA, quantize=quantize, dtype=dtype)
    assert largest_relative_difference(expected, found) <= tolerance


def test_a_streamed_run_keeps_its_budget_and_resumes_to_the_same_adapter(tmp_path: Path, plain_attention: None) -> None:
    runs = Runs(tmp_path, "cuda")
    whole = runs.train("whole")
    assert runs.streams("whole")
    assert 0 < whole.device_peak_bytes <= runs.budget_bytes
    runs.interrupt("resumed", after_steps=whole.steps // 2)
    resumed = runs.train("resumed")
    assert resumed.device_peak_bytes <= runs.budget_bytes
    assert runs.adapter("resumed") == runs.adapter("whole")
