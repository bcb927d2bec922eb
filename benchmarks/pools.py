"""Steps of layers driven directly, side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn

from benchmarks.shapes import Shape, write_store
from lopt_lite import QuantizeSettings, devices, quantize
from lopt_lite.checkpoints.build_store import DTYPES
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.float32_products import float32_products
from lopt_lite.freed_memory import FreedMemory
from lopt_lite.residency.pool import LayerPool, MicroBatch, ResidentLayers
from lopt_lite.residency.streamed import StreamedLayers
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapters import attach_adapter, set_training
from lopt_lite.training.fast_layers import fast_layers

#: Where 'make demo-model' puts the demo's model.
DEMO_MODEL = Path(".demo/SmolLM2-135M-Instruct")
SMOLLM2, ONE_B = "SmolLM2-135M", "1B shape"

_SETTINGS = TrainSettings(model="not used", data="not used")


def model_store(directory: Path, name: str, layers: int) -> Path:
    """An NF4 store within ``directory``: of SmolLM2, of ``layers`` random layers of a 1B shape, or of tiny ones."""
    store = directory / f"store-{name.replace(' ', '-')}"
    if name == SMOLLM2:
        quantize(QuantizeSettings(model=str(DEMO_MODEL), store=str(store), device="cpu"))
        return store
    shape = Shape(2048, layers, 5632, 32, 4, 32000) if name == ONE_B else Shape(64, layers, 128, 4, 2, 512)
    return write_store(store, shape)


@dataclass
class OpenModel:
    """A store and its architecture, opened as a run opens them."""

    store: Store
    skeleton: Skeleton
    device: torch.device

    @classmethod
    @contextmanager
    def open(cls, directory: Path, device: torch.device) -> Iterator[OpenModel]:
        """Open the NF4 store in ``directory``, to compute in bfloat16.

        Until the context is left, freed memory stays in the process for the next step, as in a run.
        """
        skeleton = Skeleton(locate_model(str(directory)), dtype=DTYPES["bfloat16"])
        store = Store(directory)
        skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
        skeleton.place_root_tensors(store.root(skeleton), device)
        with FreedMemory(watches=device.type == "cpu") as freed, closing(store):
            freed.keep_below(psutil.virtual_memory().available)
            yield cls(store, skeleton, device)

    def resident(self, layers: int, *, dequantize: bool) -> ResidentLayers:
        """The first ``layers`` layers with adapters, on the device."""
        return ResidentLayers(
            self.store, self.skeleton, 0, layers, device=self.device, dequantize=dequantize, on_layer=self._adapt
        )

    def streamed(self, layers: int) -> StreamedLayers:
        """The first ``layers`` layers with adapters, each loaded for each pass."""
        return StreamedLayers(self.store, self.skeleton, 0, layers, device=self.device, on_layer=self._adapt)

    def batches(self, *, tokens: int, length: int, micro_batch_tokens: int) -> list[MicroBatch]:
        """Micro-batches of a step of ``tokens`` tokens in all, in rows of ``length`` tokens."""
        generator = torch.Generator().manual_seed(0)
        rows_left = tokens // length
        made = []
        while rows_left > 0:
            rows = min(rows_left, max(1, micro_batch_tokens // length))
            ids = torch.randint(0, self.skeleton.vocabulary_rows, (rows, length), generator=generator)
            recording = self.skeleton.record(ids.to(self.device), embed=True)
            made.append(MicroBatch(recording.hidden, recording.calls))
            rows_left -= rows
        return made

    def _adapt(self, index: int, layer: nn.Module) -> None:
        attach_adapter(layer, index, skeleton=self.skeleton, settings=_SETTINGS)
        set_training(layer, True)


def step(pool: LayerPool, batches: list[MicroBatch]) -> float:
    """Forward and backward of all micro-batches; returns the loss.

    The loss is the outputs' mean square: the LM head and the optimiser cost the same however the layers are kept, and
    are left out.
    """

    def loss_backward(number: int, output: torch.Tensor) -> float:
        loss = output.float().square().mean() / len(batches)
        loss.backward()
        return float(loss.detach())

    device = batches[0].hidden.device
    with fast_layers(device), float32_products(device):
        loss = pool.accumulate(batches, loss_backward)
    for layer in pool.layers:
        for parameter in layer.parameters():
            parameter.grad = None
    return loss


@dataclass(frozen=True)
class Timing:
    """Seconds of several steps of one kind, and how long they waited for layers."""

    seconds: list[float]
    waited_s: list[float]

    @property
    def median_s(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def waiting_share(self) -> float:
        """Share of all the time that was spent waiting for layers."""
        return sum(self.waited_s) / sum(self.seconds)


def alternate(
    pools: dict[str, LayerPool], batches: list[MicroBatch], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """Time steps of several pools, one after the other and again, so that a busy machine disturbs all alike.

    Raises
    ------
    AssertionError
        The pools' losses differ: they do not do the same work.
    """
    timings = {name: Timing([], []) for name in pools}
    # A first step of each allocates what later ones use again.
    losses = {name: step(pool, batches) for name, pool in pools.items()}
    assert len(set(losses.values())) == 1, losses
    for _ in range(repeats):
        for name, pool in pools.items():
            waited_s = _waited_s(pool)
            seconds = _timed(partial(step, pool, batches), device)
            timings[name].seconds.append(seconds)
            timings[name].waited_s.append(_waited_s(pool) - waited_s)
    return timings


def _waited_s(pool: LayerPool) -> float:
    return pool.waited_s if isinstance(pool, StreamedLayers) else 0.0


def _timed(work: Callable[[], object], device: torch.device) -> float:
    devices.synchronize(device)
    started = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - started
