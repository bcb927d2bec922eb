"""Where a block's inputs come from: embedding rows for the first block, the activation cache for the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.data.dataset import Batch
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.training.activation_cache import ActivationCache, CacheLayout

#: What decides a batch's hidden states: its examples and its width.
_Wanted: TypeAlias = tuple[tuple[int, ...], int]


class BlockInputs(Protocol):
    """Makes what goes into a block."""

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """The block's input and the layers' arguments for a batch, on the device."""
        ...

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """Start reading what coming batches need, in this order, in the background.

        It is a hint: what :meth:`micro_batch` gives is the same without. Nothing but the batches named last is kept in
        host memory; what was read of others is dropped.
        """
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class EmbeddedInputs:
    """The first block's inputs: embedding rows gathered batch by batch, as the skeleton's reader gives them.

    Parameters
    ----------
    trains:
        Whether the rows are trained: gradients go through the inputs to them.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device, *, trains: bool = False) -> None:
        self._skeleton, self._device, self._trains = skeleton, device, trains

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """See :class:`BlockInputs`."""
        recording = self._skeleton.record(batch.input_ids.to(self._device), embed=True, trains=self._trains)
        return MicroBatch(recording.hidden, recording.calls)

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """Does nothing: each distinct token of a batch is one short read, mostly of rows that the system still has."""

    def close(self) -> None:
        """Nothing to let go of."""


class CacheReader:
    """Reads batches from an activation cache, in the background those that are announced.

    Parameters
    ----------
    directory, layout, keep_bytes, shards:
        See :class:`ActivationCache`.

    Attributes
    ----------
    ahead_count:
        Batches that were there before they were asked for.
    """

    def __init__(
        self,
        directory: Path,
        layout: CacheLayout,
        *,
        keep_bytes: int = 0,
        shards: Collection[int] | None = None,
    ) -> None:
        self._cache = ActivationCache(directory, layout, keep_bytes=keep_bytes, shards=shards)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache-reader")
        self._ahead: dict[_Wanted, Future[torch.Tensor]] = {}
        self.ahead_count = 0

    def read(self, batch: Batch) -> torch.Tensor:
        """Hidden states [rows, longest, hidden] of a batch, on the CPU.

        Raises
        ------
        ModelError
            The cache cannot be read.
        """
        key = _wanted(batch)
        ahead = self._ahead.pop(key, None)
        # A read that has not begun would wait behind those announced before it.
        if ahead is None or ahead.cancel():
            return self._cache.read(*key)
        self.ahead_count += 1
        return ahead.result()

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """See :class:`BlockInputs`."""
        wanted = [_wanted(batch) for batch in batches]
        for key in self._ahead.keys() - set(wanted):
            self._ahead.pop(key).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._cache.read, *key)

    def close(self) -> None:
        """Stop reading and close the cache's files."""
        self.read_ahead([])
        self._reader.shutdown(wait=True)
        self._cache.close()


class CachedInputs:
    """A later block's inputs: what the block before it made of every example.

    Parameters
    ----------
    directory, layout, keep_bytes, shards:
        The cache of the block before; see :class:`ActivationCache`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        device: torch.device,
        directory: Path,
        layout: CacheLayout,
        *,
        keep_bytes: int = 0,
        shards: Collection[int] | None = None,
    ) -> None:
        self._skeleton, self._device = skeleton, device
        self._reader = CacheReader(directory, layout, keep_bytes=keep_bytes, shards=shards)

    @property
    def ahead_count(self) -> int:
        """Batches that were there before they were asked for."""
        return self._reader.ahead_count

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """See :class:`BlockInputs`.

        Raises
        ------
        ModelError
            The cache cannot be read.
        """
        recording = self._skeleton.record(batch.input_ids.to(self._device), embed=False)
        return MicroBatch(self._reader.read(batch).to(self._device), recording.calls)

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """See :class:`BlockInputs`."""
        self._reader.read_ahead(batches)

    def close(self) -> None:
        """Stop reading and close the cache's files."""
        self._reader.close()


def _wanted(batch: Batch) -> _Wanted:
    return tuple(batch.examples.tolist()), batch.input_ids.shape[1]
