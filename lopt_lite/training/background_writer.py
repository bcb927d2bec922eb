"""Writing files while the next thing is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from lopt_lite.errors import LoptError


class BackgroundWriter:
    """Does one write at a time in a thread of its own.

    What is to happen once a write is durable (a line in the journal) is done by the thread that asked for the write,
    in the order of the writes. At most one write is under way, so that no more than its content waits in memory.

    As a context manager it waits for the last write at the end, also after an error: what became durable is then told
    as well. An error that ends the context is more telling than one of the last write, which is dropped for it; that
    write was not told of, and so is done again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: tuple[Future[object], Callable[[], None]] | None = None

    def submit(self, write: Callable[[], object], then: Callable[[], None]) -> None:
        """Start ``write`` once the one before it is done; ``then`` is called here, at a later call of this object.

        Raises
        ------
        LoptError
            What the write before raised.
        """
        self.finish()
        self._pending = (self._thread.submit(write), then)

    def poll(self) -> None:
        """Call ``then`` of a write that is done; raises what it raised."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write under way and call its ``then``; raises what it raised."""
        if self._pending is None:
            return
        future, then = self._pending
        wait([future])  # an interruption here leaves it pending
        self._pending = None
        future.result()
        then()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                with contextlib.suppress(LoptError):
                    self.finish()
        finally:
            self._thread.shutdown(wait=True)
