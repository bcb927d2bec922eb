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

    Used by one thread. At most two stretches can be in use at once, as there are two slabs.

    Parameters
    ----------
    views:
        The stretches that will be asked for, by number: a layer's index, say.
    device:
        Where their tensors are wanted.
    prefetch:
        Read the next stretch while this one is in use. Off, every read happens when it is asked for: the slow oracle.
    copies:
        How slabs get to the device; by default a :class:`CopyStream` to ``device``.

    Attributes
    ----------
    loads:
        Reads started so far.
    waited_s:
        Seconds for which this thread had to wait for the reader, and on MPS for the copy. On CUDA computing may, beyond
        that, wait for a copy on the device, which the host does not see.
    """

    def __init__(
        self,
        views: Mapping[int, ShardView],
        *,
        device: torch.device,
        prefetch: bool = True,
        copies: CopyStream | None = None,
    ) -> None:
        self._views = dict(views)
        self.slab_bytes = max(view.nbytes for view in self._views.values())
        self._copies = CopyStream(device) if copies is None else copies
        self._host = [self._copies.host_buffer(self.slab_bytes) for _ in range(_SLABS)]
        self._device = [self._copies.device_buffer(host) for host in self._host]
        self._holds: list[int | None] = [None] * _SLABS
        self._pending: list[Future[None] | None] = [None] * _SLABS
        self._users = [0] * _SLABS
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
            Stretches that will be asked for next, nearest first; the first one is read meanwhile, unless it is in a
            slab already or no slab is free.

        Raises
        ------
        RuntimeError
            Both slabs are in use, or the stream is closed.
        Exception
            What reading the stretch raised, in the reader or when it was read ahead. Asking again reads again.
        """
        slab = self._slab_of(index)
        if slab is None:
            slab = self._free_slab()
            if slab is None:
                raise RuntimeError(f"stretch {index} was asked for while {_SLABS} others are in use: {self._holds}")
            self._start_reading(slab, index)
        self._users[slab] += 1
        try:
            if self._prefetch and upcoming and self._slab_of(upcoming[0]) is None:
                ahead = self._free_slab()
                if ahead is not None:
                    self._start_reading(ahead, upcoming[0])
            self._await(slab)
            yield self._tensors(slab, self._views[index])
        finally:
            self._users[slab] -= 1
            # The slab must not be overwritten before the work queued on it is done.
            self._copies.mark_used(slab)

    def close(self) -> None:
        """Stop the reader, dropping what it was to read ahead, and let go of the slabs once no copy uses them.

        A failed read that nobody asked for is not reported.
        """
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._copies.close()
        self._holds = [None] * _SLABS
        self._pending = [None] * _SLABS
        self._host.clear()
        self._device.clear()

    def _slab_of(self, index: int) -> int | None:
        return self._holds.index(index) if index in self._holds else None

    def _free_slab(self) -> int | None:
        """A slab that nobody uses, an empty one first."""
        free = [slab for slab in range(_SLABS) if not self._users[slab]]
        empty = [slab for slab in free if self._holds[slab] is None]
        return next(iter(empty or free), None)

    def _start_reading(self, slab: int, index: int) -> None:
        pending = self._pending[slab]
        if pending is not None:
            # Read ahead and not asked for. Whether that failed does not matter any more: asking for it reads it again.
            self._wait_for_reader(pending)
        self._holds[slab] = self._pending[slab] = None
        self._pending[slab] = self._reader.submit(self._read, slab, self._views[index])
        self._holds[slab] = index
        self.loads += 1

    def _read(self, slab: int, view: ShardView) -> None:
        """In the reader thread: fill the slab's host buffer and start its copy."""
        self._copies.wait_until_unused(slab)
        view.read_into(self._host[slab][: view.nbytes])
        self._copies.copy(slab, self._host[slab][: view.nbytes], self._device[slab][: view.nbytes])

    def _await(self, slab: int) -> None:
        """Let the computing queued from now on find the slab's stretch in it."""
        pending = self._pending[slab]
        if pending is not None:
            # The future stays until it is done: after an interrupt here the slab still counts as being read.
            error = self._wait_for_reader(pending)
            self._pending[slab] = None
            if error is not None:
                self._holds[slab] = None
                raise error
        started = time.monotonic()
        self._copies.wait_for_copy(slab)
        self.waited_s += time.monotonic() - started

    def _wait_for_reader(self, pending: Future[None]) -> BaseException | None:
        started = time.monotonic()
        error = pending.exception()
        self.waited_s += time.monotonic() - started
        return error

    def _tensors(self, slab: int, view: ShardView) -> dict[str, torch.Tensor]:
        flat = self._device[slab]
        return {
            name: flat[place.start : place.end].view(place.dtype).reshape(place.shape)
            for name, place in view.tensors.items()
        }
