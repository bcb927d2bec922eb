"""Streaming stretches of files (layer shards, slices of the LM head) through two slabs of memory.

A slab is one flat, preallocated buffer as large as the largest stretch. A reader thread fills one slab with the next
stretch while the one in the other slab is computed with. A stretch is read with explicit reads, in one piece, and its
tensors are views of the slab: nothing is allocated per load, and no mapped file pages pile up in the process. On a GPU
the reader fills a pinned host slab, which is copied to a device slab in one asynchronous copy on a stream of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from lopt_lite.checkpoints.store import ShardView
from lopt_lite.devices import CopyStream

_SLABS = 2


class ShardStream:
    """Gives the tensors of stretches, in any order asked for, while reading the next ones ahead.

    Parameters
    ----------
    views:
        The stretches that will be asked for, by number: a layer's index, say.
    device:
        Where their tensors are wanted.
    prefetch:
        Read the next stretch while this one is in use. Off, every read happens when it is asked for: the slow oracle.

    Attributes
    ----------
    loads:
        Stretches read so far.
    waited_s:
        Seconds for which computing had to wait for a read.
    """

    def __init__(self, views: Mapping[int, ShardView], *, device: torch.device, prefetch: bool = True) -> None:
        self._views = dict(views)
        self.slab_bytes = max(view.nbytes for view in self._views.values())
        self._copies = CopyStream(device)
        self._host = [self._copies.host_buffer(self.slab_bytes) for _ in range(_SLABS)]
        self._device = [self._copies.device_buffer(host) for host in self._host]
        self._holds: list[int | None] = [None] * _SLABS
        self._pending: list[Future[None] | None] = [None] * _SLABS
        self._prefetch = prefetch
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
        self.loads = 0
        self.waited_s = 0.0

    def names(self, index: int) -> dict[str, object]:
        """Names of a stretch's tensors."""
        return dict.fromkeys(self._views[index].tensors)

    @contextmanager
    def item(self, index: int, upcoming: Sequence[int] = ()) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of stretch ``index``, valid until the context ends.

        Parameters
        ----------
        upcoming:
            Stretches that will be asked for next, nearest first; the first one that is not in a slab is read meanwhile.
        """
        slab = self._slab_of(index)
        if slab is None:
            slab = self._free_slab(keep=())
            self._start_reading(slab, index)
        if self._prefetch and upcoming and self._slab_of(upcoming[0]) is None:
            self._start_reading(self._free_slab(keep=(slab,)), upcoming[0])
        self._wait(slab)
        try:
            yield self._tensors(slab, self._views[index])
        finally:
            # The slab must not be overwritten before the work queued on it is done.
            self._copies.mark_used(slab)

    def close(self) -> None:
        """Stop the reader and let go of the slabs."""
        self._reader.shutdown(wait=True)
        self._host.clear()
        self._device.clear()
        self._views.clear()

    def _slab_of(self, index: int) -> int | None:
        return self._holds.index(index) if index in self._holds else None

    def _free_slab(self, *, keep: tuple[int, ...]) -> int:
        free = [slab for slab in range(_SLABS) if slab not in keep]
        empty = [slab for slab in free if self._holds[slab] is None]
        return (empty or free)[0]

    def _start_reading(self, slab: int, index: int) -> None:
        self._wait(slab)
        self._holds[slab] = index
        self.loads += 1
        self._pending[slab] = self._reader.submit(self._read, slab, self._views[index])

    def _read(self, slab: int, view: ShardView) -> None:
        self._copies.wait_until_unused(slab)
        view.read_into(self._host[slab][: view.nbytes])
        self._copies.copy(slab, self._host[slab][: view.nbytes], self._device[slab][: view.nbytes])

    def _wait(self, slab: int) -> None:
        pending, self._pending[slab] = self._pending[slab], None
        if pending is not None:
            started = time.monotonic()
            try:
                pending.result()
            except BaseException:
                self._holds[slab] = None
                raise
            self.waited_s += time.monotonic() - started
        self._copies.wait_for_copy(slab)

    def _tensors(self, slab: int, view: ShardView) -> dict[str, torch.Tensor]:
        flat = self._device[slab]
        return {
            name: flat[place.start : place.end].view(place.dtype).reshape(place.shape)
            for name, place in view.tensors.items()
        }
