"""Events as JSON Lines, for programs that follow a training."""

from __future__ import annotations

from collections.abc import Callable

from lopt_lite.events import Event, Notice

from .text import json_line


class JsonLines:
    """Writes every event as one line: its fields, its name as ``event``; numbers that are not finite are null.

    Parameters
    ----------
    write_line:
        Writes one line of text.
    """

    def __init__(self, write_line: Callable[[str], None]) -> None:
        self._write_line = write_line

    def start(self) -> None:
        """Nothing to set up."""

    def stop(self) -> None:
        """Nothing to take down."""

    def notice(self, event: Notice) -> None:
        """Write a notice as any event."""
        self.update(event)

    def update(self, event: Event) -> None:
        """Write ``event``."""
        self._write_line(json_line(event.to_json()))
