"""On an Apple GPU: copies come in order with computing, the limit is a limit, and training is what it is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lopt_lite import devices
from lopt_lite.checkpoints.store import Place, ShardView
from lopt_lite.residency.slabs import ShardStream
from tests.cuda.gpu_checks import MIB, Runs, largest_relative_difference, layer_gradients

pytestmark = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")

MPS = torch.device("mps")
SLAB_BYTES = 8 * MIB


@pytest.fixture(autouse=True)
def no_limit_is_left() -> Iterator[None]:
    """The limit belongs to the process: lift what a test has set."""
    yield
    devices.set_memory_limit(MPS, None)
    devices.release_cached_memory(MPS)


def test_a_stream_of_shards_gives_the_right_bytes() -> None:
    def view(index: int) -> ShardView:
        def read_into(buffer: torch.Tensor) -> None:
            buffer.view(torch.float32).fill_(index + 1)

        place = Place(0, SLAB_BYTES, torch.float32, (SLAB_BYTES // 4096, 1024))
        return ShardView(SLAB_BYTES, {"a": place}, read_into)

    stream = ShardStream({index: view(index) for index in range(4)}, device=MPS)
    order = [0, 1, 2, 3, 2, 1, 0] * 2
    busy = torch.randn(1024, 1024, device=MPS)
    means = []
    for position, index in enumerate(order):
        with stream.item(index, order[position + 1 :]) as tensors:
            for _ in range(20):
                busy = torch.tanh(busy @ busy)  # computing is late
            means.append(tensors["a"].mean() + 0 * busy.mean())
    stream.close()
    assert [float(mean) for mean in means] == [index + 1 for index in order]


def test_the_limit_is_kept() -> None:
    devices.release_cached_memory(MPS)
    assert devices.set_memory_limit(MPS, int(torch.mps.driver_allocated_memory()) + 256 * MIB)
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1024 * MIB, dtype=torch.uint8, device=MPS)


def test_streamed_gradients_are_the_resident_ones(tmp_path: Path) -> None:
    expected, found = layer_gradients(tmp_path, MPS, quantize="none", dtype="float32")
    assert largest_relative_difference(expected, found) <= 1e-5


def test_a_streamed_run_keeps_its_budget_and_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "mps")
    whole = runs.train("whole")
    assert runs.streams("whole")
    assert 0 < whole.device_peak_bytes <= runs.budget_bytes
    runs.interrupt("resumed", after_steps=whole.steps // 2)
    runs.train("resumed")
    assert runs.adapter("resumed") == runs.adapter("whole")
