"""Where a block's inputs come from: embedding rows for the first block, the activation cache for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.data.dataset import Batch
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.training.activation_cache import ActivationCache, CacheLayout


class BlockInputs(Protocol):
    """Makes what goes into a block."""

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """The block's input and the layers' arguments for a batch, on the device."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class EmbeddedInputs:
    """The first block's inputs: embedding rows gathered from the store's file, batch by batch."""

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self._skeleton, self._device = skeleton, device

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """See :class:`BlockInputs`."""
        recording = self._skeleton.record(batch.input_ids.to(self._device), embed=True)
        return MicroBatch(recording.hidden, recording.calls)

    def close(self) -> None:
        """Nothing to let go of."""


class CachedInputs:
    """A later block's inputs: what the block before it made of every example."""

    def __init__(self, skeleton: Skeleton, device: torch.device, directory: Path, layout: CacheLayout) -> None:
        self._skeleton, self._device = skeleton, device
        self._cache = ActivationCache(directory, layout)

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """See :class:`BlockInputs`."""
        recording = self._skeleton.record(batch.input_ids.to(self._device), embed=False)
        hidden = self._cache.read(batch.examples.tolist(), batch.input_ids.shape[1])
        return MicroBatch(hidden.to(self._device), recording.calls)

    def close(self) -> None:
        """Close the cache's files."""
        self._cache.close()
