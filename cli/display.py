"""Choose how progress is shown on standard error, and show the events of an operation."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console

from lopt_lite.events import Event, Notice

from .json_lines import JsonLines
from .plain_display import PlainDisplay
from .text import one_line


class _Progress(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def notice(self, event: Notice) -> None: ...
    def update(self, event: Event) -> None: ...


class Display:
    """A listener that shows events; use it in a ``with`` block around the operation.

    On a terminal that can be drawn on it is one live display, otherwise lines; with ``quiet`` only
    notices of what is not ordinary.

    Parameters
    ----------
    quiet:
        Show only notices, and not of what is ordinary.
    json_lines:
        Write events as JSON, one a line, whatever the stream is.
    stream:
        Where to write; standard error by default.
    """

    def __init__(self, *, quiet: bool = False, json_lines: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = _Unbreakable(sys.stderr if stream is None else stream)
        self._progress: _Progress
        if json_lines:
            self._progress = JsonLines(self._write_whole)
        elif self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not quiet:
            from .live_display import LiveDisplay  # a fifth of the start-up time, and only needed here

            self._progress = LiveDisplay(Console(file=self._stream, highlight=False))  # type: ignore[arg-type]
        else:
            self._progress = PlainDisplay(self._write_line)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_event(self, event: Event) -> None:
        """Show ``event``."""
        if self._quiet and not (isinstance(event, Notice) and not event.ordinary):
            return
        if isinstance(event, Notice):
            self._progress.notice(event)
        else:
            self._progress.update(event)

    def _write_whole(self, text: str) -> None:
        """A line that is safe as it is."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def _write_line(self, text: str) -> None:
        self._stream.write(one_line(text) + "\n" if not text.startswith("  ") else f"  {one_line(text)}\n")
        self._stream.flush()


class _Unbreakable:
    """A text stream whose reader may go away: a long training must not end because nobody looks on any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Write ``text``, or drop it once the reader has gone."""
        if not self._gone:
            try:
                self._stream.write(text)
            except OSError:
                self._gone = True
        return len(text)

    def flush(self) -> None:
        """Flush, unless the reader has gone."""
        if not self._gone:
            try:
                self._stream.flush()
            except OSError:
                self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
