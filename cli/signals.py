"""SIGTERM and SIGHUP end a command in the way that Ctrl-C does: with its exit code, message and JSON document.

None of them does once its work is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def ignore_ending_signals() -> None:
    """From now on none of them ends the process: its work is done, and its exit code is known.

    Without this, one that comes while the interpreter puts itself away would make a finished run look failed.
    """
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


class EndingSignals:
    """A ``with`` block in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt while its work goes on.

    Handlers are put back on exit. Outside the main thread signals are left alone, and so is one that is ignored
    (``nohup`` turns SIGHUP off).
    """

    def __init__(self) -> None:
        self._active = threading.current_thread() is threading.main_thread()
        self._is_over = False
        self._previous: dict[int, Any] = {}

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """The work that can be ended. Signals after it are too late to: what came of it is printed, once and whole."""
        try:
            yield
        finally:
            self._is_over = True

    def __enter__(self) -> EndingSignals:
        for number in _NUMBERS if self._active else ():
            # None: a handler that was not set by Python, and could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_over:
            raise KeyboardInterrupt
